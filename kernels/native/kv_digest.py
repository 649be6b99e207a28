"""The compiled library of kv_digest.cpp; calls release the interpreter's lock."""

import ctypes
import functools
from ctypes import POINTER, c_char_p, c_int, c_int64, c_void_p

import numpy as np
from numpy.typing import NDArray

from baton.kernels.native.build import NoNativeCode, build

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int64]
Columns = tuple[Ints, Ints, Ints]
"""Offsets and lengths of pieces, and where the pieces of each unit end."""


class PieceTable(ctypes.Structure):
    """Where the bytes of units lie (`Pieces` of kv_digest.cpp); it holds copies of the columns.

    For a few pieces it takes a third of the time to copy columns that it takes to find where they
    are, and for many it takes none beside the hash.
    """

    _fields_ = (
        ("offsets", c_char_p),
        ("lengths", c_char_p),
        ("ends", c_char_p),
        ("into", c_char_p),
        ("labels", c_char_p),
        ("count", c_int64),
        ("units", c_int64),
    )


_FUNCTIONS = {
    "baton_digest_vector_bytes": (c_int, ()),
    "baton_digest": (c_int, (c_char_p, c_void_p, c_int64, POINTER(PieceTable), c_void_p)),
    "baton_digest_of_sums": (
        None,
        (c_char_p, c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_void_p),
    ),
    "baton_copy_and_digest": (
        c_int,
        (c_char_p, c_void_p, c_int64, c_void_p, c_int64, POINTER(PieceTable), c_void_p),
    ),
}
_WRONG = {1: "units do not end, in order, with the last piece", 2: "a piece lies outside of memory"}


class KVDigestLibrary:
    """The functions of kv_digest.cpp, on addresses; see kernels/kv_digest.py for what they do."""

    def __init__(self, path: str) -> None:
        """Load it; raises NoNativeCode if that fails."""
        try:
            self._library = ctypes.CDLL(path)
            for name, (result, arguments) in _FUNCTIONS.items():
                function = getattr(self._library, name)
                function.restype, function.argtypes = result, arguments
        except (OSError, AttributeError) as error:
            raise NoNativeCode(f"{path} does not load: {error}") from None

    @property
    def vector_bytes(self) -> int:
        """Return how many bytes one of its vector instructions takes."""
        return int(self._library.baton_digest_vector_bytes())

    def digest(self, key: bytes, memory: Bytes, pieces: Columns, labels: Bytes, out: Bytes) -> None:
        """Write the hash of each unit to `out` [units, 16]; see `hash_units`."""
        table = _table(pieces, pieces[0], labels)
        size, at = memory.size, _address(out)
        _raise(self._library.baton_digest(key, _address(memory), size, table, at))

    def digest_of_sums(self, key: bytes, sums: Ints, chunks: Ints, sizes: Ints, out: Bytes) -> None:
        """Write the hash of each unit to `out` [units, 16]; see `hashes_of_sums`."""
        units, stride, _ = sums.shape
        assert chunks.size == sizes.size == units, "a number for each unit"
        self._library.baton_digest_of_sums(
            key, *map(_address, (sums, chunks, sizes)), units, stride, _address(out)
        )

    def copy_and_digest(
        self,
        key: bytes,
        target: Bytes,
        into: Ints,
        source: Bytes,
        pieces: Columns,
        labels: Bytes,
        out: Bytes,
    ) -> None:
        """Copy, and write the hash of each unit to `out` [units, 16]; see `copy_and_hash`."""
        table = _table(pieces, into, labels)
        to, origin, at = _address(target), _address(source), _address(out)
        copy = self._library.baton_copy_and_digest
        _raise(copy(key, to, target.size, origin, source.size, table, at))


@functools.cache
def load_kv_digest() -> KVDigestLibrary:
    """Return the library, compiled first if need be; raises NoNativeCode if it cannot be had."""
    return KVDigestLibrary(str(build(source="kv_digest.cpp")))


def _address(array: Bytes | Ints) -> int:
    flags = array.flags
    assert flags.c_contiguous, "not as C++ reads it"
    if flags.writeable and array.size:  # a fifth of the time
        return ctypes.addressof(ctypes.c_char.from_buffer(array.data))
    return array.ctypes.data


def _table(pieces: Columns, into: Ints, labels: Bytes) -> PieceTable:
    offsets, lengths, ends = pieces
    columns = offsets, lengths, ends, into
    assert all(column.dtype == np.int64 for column in columns), "not as C++ reads it"
    assert offsets.size == lengths.size == into.size, "an offset and a length for each piece"
    assert labels.nbytes == 64 * ends.size, "a label for each unit"
    copies = [column.tobytes() for column in columns]
    return PieceTable(*copies, labels.tobytes(), lengths.size, ends.size)


def _raise(result: int) -> None:
    if result:
        raise ValueError(_WRONG[result])
