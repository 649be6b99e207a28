"""From a checkpoint folder to a model that is ready to run."""

from pathlib import Path

import torch

from baton.core.errors import InvalidConfig
from baton.models.decoder import Decoder
from baton.models.spec import read_spec
from baton.models.weights import Checkpoint, torch_dtype


def load_model(
    model_dir: Path, *, dtype: str = "float32", threads: int = 1, max_length: int | None = None
) -> Decoder:
    """Load a checkpoint folder to compute in `dtype` with `threads` CPU threads.

    `max_length` is the tokens that a sequence may have where the model is served, if that is less
    than what the model was made for. Raises InvalidConfig that names the file, field or tensor
    that is missing or unsupported.
    """
    if threads < 1:
        raise InvalidConfig("threads", threads, "a whole number of at least 1")
    spec = read_spec(model_dir, max_length=max_length)
    torch.set_num_threads(threads)
    checkpoint = Checkpoint(model_dir, torch_dtype(dtype))
    return Decoder(spec, checkpoint, dtype=dtype, threads=threads)
