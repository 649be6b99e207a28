"""The compiled library of add_norm.cpp; calls release the interpreter's lock."""

import ctypes
import functools
from collections.abc import Sequence
from ctypes import c_float, c_int, c_int64, c_void_p

from baton.kernels.native.build import NoNativeCode, build


class AddNormLibrary:
    """The function of add_norm.cpp, on addresses; see kernels/add_rms_norm.py for what it does."""

    def __init__(self, path: str) -> None:
        """Load it; raises NoNativeCode if that fails."""
        try:
            self._run = ctypes.CDLL(path).baton_add_norm
        except (OSError, AttributeError) as error:
            raise NoNativeCode(f"{path} does not load: {error}") from None
        pointer, size = c_void_p, c_int64
        self._run.argtypes = (
            *(pointer, c_int, pointer, size, size),
            *(pointer, c_float, pointer),
        )
        self._run.restype = None
        self._addresses = tuple(c_void_p * count for count in range(_MOST + 1))

    def add_norm(
        self,
        addends: Sequence[int],
        stream: int,
        shape: tuple[int, int],
        weight: int,
        eps: float,
        out: int,
    ) -> None:
        """Add rows of float32 of `shape` [rows, width] to the stream; write its norm to `out`."""
        count = len(addends)
        array = self._addresses[count] if count <= _MOST else c_void_p * count
        self._run(array(*addends), count, stream, *shape, weight, eps, out)


_MOST = 8
"""Addends for which the array's type, which takes long to make, is at hand."""


@functools.cache
def load_add_norm() -> AddNormLibrary:
    """Return the library, compiled first if need be; raises NoNativeCode if it cannot be had."""
    return AddNormLibrary(str(build(source="add_norm.cpp")))
