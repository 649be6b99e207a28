"""From a checkpoint folder to a model that is ready to run."""

from pathlib import Path

import torch

from baton.core.errors import InvalidConfig
from baton.kernels.native.build import NoNativeCode
from baton.kernels.native.library import load_library
from baton.models.decoder import Decoder
from baton.models.native import NativeDecoder
from baton.models.native_weights import NATIVE_DTYPES
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
) -> Model:
    """Load a checkpoint folder to compute in `dtype` with `threads` CPU threads.

    `max_length` is the tokens that a sequence may have where the model is served, if that is less
    than what the model was made for. `executor` is one of EXECUTORS; auto is native wherever that
    can be had. Raises InvalidConfig that names the file, field or tensor that is missing or
    unsupported, and an executor that cannot be had.
    """
    if threads < 1:
        raise InvalidConfig("threads", threads, "a whole number of at least 1")
    if executor not in EXECUTORS:
        raise InvalidConfig("executor", executor, ", ".join(EXECUTORS))
    spec = read_spec(model_dir, max_length=max_length)
    torch.set_num_threads(threads)
    checkpoint = Checkpoint(model_dir, torch_dtype(dtype))
    why = "as asked for"
    if executor != "torch":
        try:
            return _native(spec, model_dir, dtype, threads)
        except NoNativeCode as error:
            why = str(error)
    if executor == "native":
        raise InvalidConfig("executor", executor, f"auto or torch here: {why}")
    return Decoder(spec, checkpoint, dtype=dtype, threads=threads, why=why)


def _native(spec: ModelSpec, model_dir: Path, dtype: str, threads: int) -> NativeDecoder:
    """Return the model for the native step; raises NoNativeCode before anything is read."""
    if dtype not in NATIVE_DTYPES:
        raise NoNativeCode(f"native code computes in {' or '.join(NATIVE_DTYPES)}, not in {dtype}")
    library = load_library()
    checkpoint = Checkpoint(model_dir, torch.float32)
    return NativeDecoder(spec, checkpoint, library, threads=threads, dtype=dtype)
