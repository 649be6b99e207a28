"""Copies runs of bytes between addresses of a device, many by one kernel."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from baton.kernels.native.kv_digest import Ints

RunCopier = Callable[[Ints, Ints, Ints, int], None]
"""Begins to copy runs from `sources` to `targets` (addresses) of `lengths`, on a CUDA stream."""


def gpu_run_copier(index: int) -> RunCopier:
    """Return a copier for the CUDA device number `index`.

    Raises ImportError if there is no Triton.
    """
    from baton.kernels.triton.run_copy import copy_runs

    device = torch.device("cuda", index)

    def copy(targets: Ints, sources: Ints, lengths: Ints, stream: int) -> None:
        external = torch.cuda.ExternalStream(stream, device)  # type: ignore[no-untyped-call]
        with torch.cuda.device(device), torch.cuda.stream(external):
            table = run_table(targets, sources, lengths).pin_memory()
            copy_runs(
                table.to(device, non_blocking=True), int(lengths.max()), grain=grain_of(table)
            )

    return copy


def run_table(targets: Ints, sources: Ints, lengths: Ints) -> Tensor:
    """Return runs as a kernel takes them, [runs, (target, source, length)] int64."""
    return torch.from_numpy(np.stack([targets, sources, lengths], axis=1))


def grain_of(table: Tensor) -> int:
    """Return in how large words, 16, 4 or 1 bytes, all addresses and lengths of a table are."""
    together = int(np.bitwise_or.reduce(table.numpy().ravel()))
    return next(size for size in (16, 4, 1) if together % size == 0)
