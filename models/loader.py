"""From a checkpoint folder to a model that is ready to run."""

from pathlib import Path

import torch

from baton.core.errors import InvalidConfig
from baton.kernels.backend import choose_backend, use_backend
from baton.kernels.native.build import NoNativeCode
from baton.kernels.native.library import load_library
from baton.models.decoder import Decoder
from baton.models.mesh_plan import check_mesh
from baton.models.native import NativeDecoder
from baton.models.native_weights import NATIVE_DTYPES
from baton.models.share import Share
from baton.models.spec import ModelSpec, read_spec
from baton.models.weights import Checkpoint, torch_dtype

EXECUTORS = ("auto", "native", "torch")

Model = Decoder | NativeDecoder


def load_model(
    model_dir: Path,
    *,
    dtype: str = "float32",
    threads: int = 1,
    max_length: int | None = None,
    executor: str = "auto",
    share: Share | None = None,
    device: str = "cpu",
) -> Model:
    """Load a checkpoint folder to compute in `dtype` with `threads` CPU threads.

    `max_length` is the tokens that a sequence may have where the model is served, if that is less
    than what the model was made for. `executor` is one of EXECUTORS; auto is native wherever that
    can be had. `share` is the part of the model that is wanted, if other ranks have the rest: torch
    computes it. `device` is where the model lies and runs; on a GPU torch computes it,
    by the backend that kernels/backend.py chooses. Raises InvalidConfig that names the file, field
    or tensor that is missing or unsupported, an executor that cannot be had, and a mesh that the
    model cannot be spread over.
    """
    if threads < 1:
        raise InvalidConfig("threads", threads, "a whole number of at least 1")
    if executor not in EXECUTORS:
        raise InvalidConfig("executor", executor, ", ".join(EXECUTORS))
    spec = read_spec(model_dir, max_length=max_length)
    if share is not None:
        check_mesh(spec, share.mesh)
    torch.set_num_threads(threads)
    choice = choose_backend(device)
    use_backend(choice.backend)
    checkpoint = Checkpoint(model_dir, torch_dtype(dtype), device)
    why = "as asked for" if checkpoint.device.type == "cpu" else choice.why
    if executor != "torch" and checkpoint.device.type == "cpu":
        try:
            return _native(spec, model_dir, dtype, threads, share)
        except NoNativeCode as error:
            why = str(error)
    if executor == "native":
        raise InvalidConfig("executor", executor, f"auto or torch here: {why}")
    return Decoder(spec, checkpoint, dtype=dtype, threads=threads, why=why, share=share)


def _native(
    spec: ModelSpec, model_dir: Path, dtype: str, threads: int, share: Share | None
) -> NativeDecoder:
    """Return the model for the native step; raises NoNativeCode before anything is read."""
    if dtype not in NATIVE_DTYPES:
        raise NoNativeCode(f"native code computes in {' or '.join(NATIVE_DTYPES)}, not in {dtype}")
    if share is not None and share.mesh.size > 1:
        raise NoNativeCode(f"native code computes on one rank, not on {share.mesh}")
    library = load_library()
    checkpoint = Checkpoint(model_dir, torch.float32)
    return NativeDecoder(spec, checkpoint, library, threads=threads, dtype=dtype)
