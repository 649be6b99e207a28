"""How much of a tensor to work on at a time."""

from collections.abc import Iterator

import torch

PASS_BYTES = 1 << 19
"""What a processor's own cache holds, several times: inputs, results and what is in between."""


def passes(rows: int, row_bytes: int, device: torch.device) -> Iterator[slice]:
    """Yield the rows in parts, each to be done from first to last operation; on GPUs all in one.

    On CPUs the operations after the first then find their input in the cache, and temporary tensors
    stay so small that the allocator has their pages at hand.
    """
    step = max(1, rows if device.type != "cpu" else PASS_BYTES // row_bytes)
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))
