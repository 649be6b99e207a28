"""Weights as the native step reads them: packed straight from the mapped files."""

import ctypes
import mmap
import os
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from baton.kernels.native.library import Format, Library, Matrix, Source, Stored

STORED = {
    torch.float32: Stored.FLOAT32,
    torch.bfloat16: Stored.BFLOAT16,
    torch.float16: Stored.FLOAT16,
}
NATIVE_DTYPES = ("float32", "bfloat16")
"""What products can be computed in."""
# A tensor of fewer values than this is packed before another thread has started.
_ALONE = 1 << 16
_MOST_THREADS = 16


class NativeWeights:
    """Packs matrices, and owns the memory of all that operations point to."""

    def __init__(self, library: Library, *, dtype: str = "float32") -> None:
        """`dtype` is what products are computed in: float32 or bfloat16."""
        assert dtype in NATIVE_DTYPES, dtype
        self._library = library
        self._dtype = dtype
        self._kept: list[object] = []
        self._threads = min(_MOST_THREADS, len(os.sched_getaffinity(0)))
        self.nbytes = 0
        """Of the packed matrices."""

    def __repr__(self) -> str:
        return f"<NativeWeights of {self.nbytes >> 20} MiB>"

    def matrix(self, parts: Sequence[Tensor], *, exact: bool = False) -> Matrix:
        """Pack tensors [rows, inputs], one below the other; strides are free.

        For products in float32, which are computed with `exact` whatever the dtype, tensors stay
        bfloat16 if all are: their values become floats exactly when they are used. Others become
        float32. For products in bfloat16 all become bfloat16.
        """
        inputs, outputs = parts[0].shape[1], sum(part.shape[0] for part in parts)
        form = Format.PAIRS
        if exact or self._dtype == "float32":
            narrow = all(part.dtype == torch.bfloat16 for part in parts)
            form = Format.BFLOAT16 if narrow else Format.FLOAT32
        matrix = Matrix(self._room(inputs, outputs, form), inputs, outputs, form)
        first = 0
        for part in parts:
            rows = part.shape[0]
            source = Source(part.data_ptr(), rows, *part.stride(), STORED[part.dtype])
            threads = 1 if part.numel() < _ALONE else self._threads
            self._library.pack(matrix, first, source, threads)
            first += rows
        return matrix

    def _room(self, inputs: int, outputs: int, form: Format) -> int:
        """Return the address of zeros for a packed matrix, in huge pages if the system has any."""
        size = self._library.packed_bytes(inputs, outputs, form)
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        self._kept.append(memory)
        self.nbytes += size
        return int(np.frombuffer(memory, dtype=np.uint8).ctypes.data)

    def array(self, matrices: Sequence[Matrix]) -> int:
        """Return the address of matrices one after the other."""
        return self.keep((Matrix * len(matrices))(*matrices))

    def keep(self, structure: ctypes.Structure | ctypes.Array[Matrix]) -> int:
        """Return the address of a structure that is to stay."""
        self._kept.append(structure)
        return ctypes.addressof(structure)

    def floats(self, tensor: Tensor | None) -> int | None:
        """Return the address of a small tensor's values in float32; None for None."""
        if tensor is None:
            return None
        kept = tensor.to(torch.float32).contiguous()
        self._kept.append(kept)
        return kept.data_ptr()

    def table(self, tensor: Tensor) -> tuple[int, Stored]:
        """Return the address of a mapped tensor that is read as it is, and what it holds."""
        kept = tensor.contiguous()
        self._kept.append(kept)
        return kept.data_ptr(), STORED[kept.dtype]
