"""The compiled library of kv_digest.cpp; calls release the interpreter's lock."""

import ctypes
import functools
from ctypes import c_char_p, c_int, c_int64, c_void_p

import numpy as np
from numpy.typing import NDArray

from baton.kernels.native.build import NoNativeCode, build

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int64]
Columns = tuple[Ints, Ints, Ints]
"""Offsets and lengths of pieces, and where the pieces of each unit end."""


_INT64 = np.dtype(np.int64)
_MEMORY = (c_void_p, c_int64)
_FUNCTIONS = {
    "baton_digest_vector_bytes": (c_int, ()),
    "baton_digest": (
        c_int,
        (c_char_p, *_MEMORY, *[c_char_p] * 4, c_int64, c_int64, c_void_p),
    ),
    "baton_digest_of_sums": (
        None,
        (c_char_p, c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_void_p),
    ),
    "baton_copy_and_digest": (
        c_int,
        (c_char_p, *_MEMORY, *_MEMORY, *[c_char_p] * 5, c_int64, c_int64, c_void_p),
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
        lines = _as_bytes(pieces, pieces[0], labels)
        size, at, counts = memory.size, _address(out), (pieces[0].size, pieces[2].size)
        _raise(self._library.baton_digest(key, _address(memory), size, *lines, *counts, at))

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
        offsets, lengths, ends, lines = _as_bytes(pieces, into, labels)
        result = self._library.baton_copy_and_digest(
            key,
            _address(target),
            target.size,
            _address(source),
            source.size,
            offsets,
            lengths,
            ends,
            into.tobytes(),
            lines,
            into.size,
            pieces[2].size,
            _address(out),
        )
        _raise(result)


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


def _as_bytes(pieces: Columns, into: Ints, labels: Bytes) -> tuple[bytes, bytes, bytes, bytes]:
    """Return copies of the columns and labels.

    Of a few pieces that takes a third of the time to find where arrays are, or to make a structure
    of them; of many, nothing beside the hash.
    """
    offsets, lengths, ends = pieces
    for column in (offsets, lengths, ends, into):
        assert column.dtype == _INT64, "not as C++ reads it"
    assert offsets.size == lengths.size == into.size, "an offset and a length for each piece"
    assert labels.nbytes == 64 * ends.size, "a label for each unit"
    return offsets.tobytes(), lengths.tobytes(), ends.tobytes(), labels.tobytes()


def _raise(result: int) -> None:
    if result:
        raise ValueError(_WRONG[result])
