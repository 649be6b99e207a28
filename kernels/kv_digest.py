"""The hash of the bytes of KV: independent sums under a key, in as many threads as one likes.

A key is 66 lines K[0] … K[65] of 64 bytes and two points r, s of 61 bits. A line is eight pairs of
little-endian 32-bit words, low word first. A unit's bytes, the last line padded with zeros, and one
line more, its label, are cut into chunks of 64 lines. Of a chunk of n lines M[0] … M[n-1], with +
on words modulo 2³²,

    a[i], b[i] = low and high words of M[i] + K[i+1]
    a[-1] = low words of K[0]; b[n] = high words of K[n+1]
    same = Σ a[i]·b[i] over i < n;  next = Σ a[i-1]·b[i] over i ≤ n        modulo 2⁶⁴, over 8 lanes

and the hash is two polynomials modulo 2⁶¹-1 over the 32-bit words of all (same, next), low words
first, and at last the number of bytes, at r and at s: 8 bytes each, little-endian.

`same` is NH (Black, Halevi, Krawczyk, Krovetz, Rogaway: "UMAC", 1999). `next` multiplies the same
keyed words again, one line apart, so that a second sum costs two instructions a vector and not
four. Two chunks that differ have equal sums (or sums that differ by given numbers) for at most a
share of 2⁻⁶³ of all keys. Proof: if low words differ, take the last a[l] of a lane that does, and
fix all keys but those of b[l] and b[l+1]. Of b[l+1], `same` has a[l+1]·(b[l+1] - b'[l+1]), which
wraps to one of two values; for each there is at most one key of b[l] (NH's lemma), and for that
one of b[l+1] in `next`. If only high words differ, take the first b[l] that does: `same` leaves at
most one key of a[l], then `next` one of a[l-1]. The polynomials add (4 c / 2⁶¹)² for c chunks.
The bound holds for bytes and labels that were chosen without knowing the key.
"""

import functools
import hashlib
from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from baton.core.log import get_logger
from baton.kernels.native.build import NoNativeCode
from baton.kernels.native.kv_digest import Ints, load_kv_digest

DIGEST_BYTES = 16
LINE_BYTES = 64
CHUNK_LINES = 64
KEY_LINES = CHUNK_LINES + 2
_KEY_BYTES = KEY_LINES * LINE_BYTES + 16
_PRIME = (1 << 61) - 1
_CHUNKS_AT_ONCE = 64
"""256 KiB of bytes and as much again for what is made of them: about what a cache holds."""

Bytes = NDArray[np.uint8]
Memory = memoryview | Bytes
Digests = NDArray[np.uint8]
"""[units, 16]."""
Labels = NDArray[np.uint8]
"""What is said of each unit and hashed with it [units, 64]."""

_log = get_logger(__name__)


class HashesItself(ABC):
    """Memory that this process cannot read, but have hashed: see kernels/kv_digest_device.py."""

    @abstractmethod
    def hash_units(self, key: bytes, pieces: "Pieces", labels: Labels) -> Digests:
        """Return what `hash_units` does, of this memory."""


class Pieces(NamedTuple):
    """Where the bytes of units lie: unit u is the pieces from ends[u-1] up to ends[u]."""

    offsets: Ints
    """Bytes from the start of the memory [pieces]."""
    lengths: Ints
    """Bytes [pieces]."""
    ends: Ints
    """[units]."""


def expand_key(secret: bytes) -> bytes:
    """Return a key made of `secret` by SHAKE-128 (FIPS 202)."""
    return hashlib.shake_128(b"baton kv digest\0" + secret).digest(_KEY_BYTES)


def hash_units(
    key: bytes, memory: "Memory | HashesItself", pieces: Pieces, labels: Labels
) -> Digests:
    """Return the hash of each unit, its pieces one after the other, and of its label.

    One call of native code without the interpreter's lock, or numpy where there is no compiler.
    Raises ValueError for pieces that lie outside of the memory or are not all of units in order.
    """
    assert len(key) == _KEY_BYTES, "not of expand_key"
    if isinstance(memory, HashesItself):
        return memory.hash_units(key, pieces, labels)
    source = _bytes_of(memory)
    if not is_native():
        return reference_hashes(key, source, pieces, labels)
    found = np.empty((pieces.ends.size, DIGEST_BYTES), np.uint8)
    load_kv_digest().digest(key, source, pieces, labels, found)
    return found


def copy_and_hash(
    key: bytes, target: Memory, into: Ints, source: Memory, pieces: Pieces, labels: Labels
) -> Digests:
    """Copy pieces of units to the offsets `into` [pieces] of `target`, and return their hashes.

    What is hashed is what was written, from the registers that it passed through: whoever changes
    the source meanwhile changes both or neither. Source and target do not overlap. Raises
    ValueError as `hash_units` does, before anything is written.
    """
    assert len(key) == _KEY_BYTES, "not of expand_key"
    come, go = _bytes_of(source), _bytes_of(target)
    assert go.flags.writeable, "the target is read-only"
    if not is_native():
        check_pieces(pieces, pieces.offsets, come.size)
        check_pieces(pieces, into, go.size)
        for here, there, length in zip(into, pieces.offsets, pieces.lengths, strict=True):
            go[here : here + length] = come[there : there + length]
        return reference_hashes(key, go, pieces._replace(offsets=into), labels)
    found = np.empty((pieces.ends.size, DIGEST_BYTES), np.uint8)
    load_kv_digest().copy_and_digest(key, go, into, come, pieces, labels, found)
    return found


def _bytes_of(memory: Memory) -> Bytes:
    return memory if isinstance(memory, np.ndarray) else np.frombuffer(memory, np.uint8)


def hashes_of_sums(key: bytes, sums: Ints, chunks: Ints, sizes: Ints) -> Digests:
    """Return the hashes of units whose chunks were summed elsewhere.

    `sums` [units, at most so many chunks, (same, next)], of which unit u has `chunks`[u]; `sizes`
    [units] is in bytes.
    """
    assert len(key) == _KEY_BYTES, "not of expand_key"
    found = np.empty((len(sums), DIGEST_BYTES), np.uint8)
    if is_native():
        load_kv_digest().digest_of_sums(key, np.ascontiguousarray(sums), chunks, sizes, found)
        return found
    for unit, count in enumerate(chunks):
        words = sums[unit, :count].reshape(-1).view("<u4").tolist()
        found[unit] = _values([*words, int(sizes[unit])], key)
    return found


@functools.cache
def is_native() -> bool:
    """Return whether native code computes hashes; compiles it first if need be."""
    try:
        load_kv_digest()
    except NoNativeCode as error:
        _log.warning("KV digests are computed by numpy, many times slower", why=str(error))
        return False
    return True


def reference_hashes(key: bytes, memory: Bytes, pieces: Pieces, labels: Labels) -> Digests:
    """Return what `hash_units` does, computed by numpy."""
    check_pieces(pieces, pieces.offsets, memory.size)
    found = np.empty((pieces.ends.size, DIGEST_BYTES), np.uint8)
    first = 0
    for unit, end in enumerate(pieces.ends):
        within = zip(pieces.offsets[first:end], pieces.lengths[first:end], strict=True)
        parts = [memory[at : at + length] for at, length in within]
        data = np.concatenate([memory[:0], *parts])
        found[unit] = _reference_hash(key, data, labels[unit])
        first = end
    return found


def _reference_hash(key: bytes, data: Bytes, label: Bytes) -> Bytes:
    padding = np.zeros(-data.size % LINE_BYTES, np.uint8)
    lines = np.concatenate([data, padding, label])
    step = _CHUNKS_AT_ONCE * CHUNK_LINES * LINE_BYTES
    words: list[int] = []
    for start in range(0, lines.size, step):
        words += _chunk_sums(key, lines[start : start + step]).view("<u4").tolist()
    return _values([*words, data.size], key)


def _values(words: list[int], key: bytes) -> Bytes:
    """Return the polynomials over `words` at both points."""
    points = np.frombuffer(key, "<u8", offset=KEY_LINES * LINE_BYTES)
    values = [_polynomial(words, (int(point) & _PRIME) % _PRIME) for point in points]
    return np.array(values, "<u8").view(np.uint8)


def _chunk_sums(key: bytes, lines: Bytes) -> NDArray[np.uint64]:
    """Return `same` and `next` of each chunk, one after the other."""
    whole = lines.size // (CHUNK_LINES * LINE_BYTES) * CHUNK_LINES * LINE_BYTES
    parts = (part.view("<u4") for part in (lines[:whole], lines[whole:]) if part.size)
    shaped = (part.reshape(-1, min(part.size // 16, CHUNK_LINES), 8, 2) for part in parts)
    return np.concatenate([_equal_chunks(key, chunks) for chunks in shaped])


def _equal_chunks(key: bytes, chunks: NDArray[np.uint32]) -> NDArray[np.uint64]:
    """Return the same of chunks that have as many lines each [chunks, lines, 8, 2]."""
    count, size = chunks.shape[:2]
    keys = np.frombuffer(key, "<u4", KEY_LINES * 16).reshape(KEY_LINES, 8, 2)
    keyed = chunks + keys[1 : size + 1]
    low = np.empty((count, size + 1, 8), np.uint64)
    high = np.empty((count, size + 1, 8), np.uint64)
    low[:, 0], low[:, 1:] = keys[0, :, 0], keyed[..., 0]
    high[:, size], high[:, :size] = keys[size + 1, :, 1], keyed[..., 1]
    sums = np.empty((count, 2), np.uint64)
    sums[:, 0] = (low[:, 1:] * high[:, :-1]).sum(axis=(1, 2))
    sums[:, 1] = (low * high).sum(axis=(1, 2))
    return sums.reshape(-1)


def _polynomial(words: list[int], point: int) -> int:
    value = 0
    for word in words:
        value = (value * point + word) % _PRIME
    return value


def check_pieces(pieces: Pieces, offsets: Ints, size: int) -> None:
    """Raise ValueError for pieces that native code refuses too, in memory of `size` bytes."""
    lengths, ends = pieces.lengths, pieces.ends
    if offsets.size != lengths.size:
        raise ValueError(f"{offsets.size} offsets for {lengths.size} pieces")
    steps = np.diff(ends, prepend=0)
    if np.any(steps < 0) or int(steps.sum()) != lengths.size:
        raise ValueError(f"units do not end, in order, with piece {lengths.size}")
    outside = (offsets < 0) | (lengths < 0) | (offsets > size - lengths.clip(0))
    if outside.any():
        raise ValueError(f"a piece lies outside of {size} bytes")
