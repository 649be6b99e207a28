"""The hash of KV: as it is defined, the same from every library, and different for other bytes."""

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from baton.kernels import kv_digest
from baton.kernels.kv_digest import (
    CHUNK_LINES,
    LINE_BYTES,
    Pieces,
    copy_and_hash,
    expand_key,
    hash_units,
    is_native,
    reference_hashes,
)
from baton.kernels.native.build import FLAGS, NoNativeCode, build
from baton.kernels.native.kv_digest import KVDigestLibrary

CHUNK = CHUNK_LINES * LINE_BYTES
KEY = expand_key(b"secret")
PRIME = 2**61 - 1
MEMORY = np.random.default_rng(0).integers(0, 256, 8 * CHUNK, np.uint8)
LENGTHS = [0, 1, 3, 63, 64, 65, 127, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 64, 5 * CHUNK + 77]
TARGETS = {
    "this processor": FLAGS,
    "avx2": tuple("-march=haswell" if flag == "-march=native" else flag for flag in FLAGS),
    "128-bit vectors": tuple(flag for flag in FLAGS if flag != "-march=native"),
}

LABEL = np.arange(100, 164, dtype=np.uint8)

Bytes = NDArray[np.uint8]


def labels_of(count: int) -> Bytes:
    """Return as many labels, none equal."""
    return LABEL + np.arange(count, dtype=np.uint8)[:, None]


def defined_hash(key: bytes, data: bytes, label: bytes) -> bytes:
    """Compute, word by word, what the docstring of kernels/kv_digest.py defines."""
    words = np.frombuffer(key, "<u4").tolist()
    lines = [data[at : at + LINE_BYTES].ljust(LINE_BYTES, b"\0") for at in range(0, len(data), 64)]
    lines.append(label)
    coefficients: list[int] = []
    for first in range(0, len(lines), CHUNK_LINES):
        chunk = lines[first : first + CHUNK_LINES]
        same = following = 0
        for lane in range(8):
            before = words[2 * lane]
            for number, line in enumerate(chunk):
                low, high = np.frombuffer(line, "<u4").tolist()[2 * lane : 2 * lane + 2]
                low = (low + words[16 * (number + 1) + 2 * lane]) % 2**32
                high = (high + words[16 * (number + 1) + 2 * lane + 1]) % 2**32
                same += low * high
                following += before * high
                before = low
            following += before * words[16 * (len(chunk) + 1) + 2 * lane + 1]
        for value in (same, following):
            coefficients += [value % 2**32, value % 2**64 >> 32]
    coefficients.append(len(data))
    points = [int.from_bytes(key[at : at + 8], "little") & PRIME for at in (66 * 64, 66 * 64 + 8)]
    values = [0, 0]
    for coefficient in coefficients:
        values = [(v * p + coefficient) % PRIME for v, p in zip(values, points, strict=True)]
    return b"".join(value.to_bytes(8, "little") for value in values)


def pieces_of(*units: Sequence[tuple[int, int]]) -> Pieces:
    """Return units of (offset, length) pieces as a table."""
    flat = np.array([piece for unit in units for piece in unit], np.int64).reshape(-1, 2)
    ends = np.cumsum([len(unit) for unit in units], dtype=np.int64)
    return Pieces(flat[:, 0].copy(), flat[:, 1].copy(), ends)


def hash_of(data: Bytes, key: bytes = KEY, label: Bytes = LABEL) -> bytes:
    """Return the hash of one contiguous unit."""
    return hash_units(key, data, pieces_of([(0, data.size)]), label[None]).tobytes()


@pytest.fixture(scope="module", params=list(TARGETS))
def library(request: pytest.FixtureRequest) -> KVDigestLibrary:
    try:
        return KVDigestLibrary(str(build(TARGETS[request.param], "kv_digest.cpp")))
    except NoNativeCode as error:
        pytest.skip(str(error))


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse() -> KVDigestLibrary:
        raise NoNativeCode("none here")

    monkeypatch.setattr(kv_digest, "load_kv_digest", refuse)
    is_native.cache_clear()
    yield
    is_native.cache_clear()


units = st.lists(
    st.lists(st.tuples(st.integers(0, 2 * CHUNK), st.integers(0, 2 * CHUNK)), max_size=4),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize("length", LENGTHS)
def test_it_is_what_is_defined(length: int) -> None:
    data = MEMORY[5 : 5 + length]
    assert hash_of(data) == defined_hash(KEY, data.tobytes(), LABEL.tobytes())
    pieces = pieces_of([(0, length)])
    assert reference_hashes(KEY, data, pieces, LABEL[None]).tobytes() == hash_of(data)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "6976e147c367990ec537e9ad905a5817"),
        (b"a", "04a5684c0f26bd03d257af34b346e31a"),
        (bytes(range(256)) * 40, "ad2c43dcea4a8101ea033572e99ed01c"),
    ],
    ids=["nothing", "one byte", "two chunks and a half"],
)
def test_known_vectors(data: bytes, expected: str) -> None:
    """Both sides of a handover must agree on them: other values need another protocol version."""
    assert hash_of(np.frombuffer(data, np.uint8), expand_key(b"known")).hex() == expected


def test_the_key_is_shake_128() -> None:
    assert hashlib.shake_128(b"baton kv digest\0secret").digest(66 * 64 + 16) == KEY


@settings(max_examples=60, deadline=None)
@given(units=units)
def test_every_library_finds_the_same_in_any_pieces(
    library: KVDigestLibrary, units: list[list[tuple[int, int]]]
) -> None:
    pieces = pieces_of(*units)
    found = np.empty((len(units), 16), np.uint8)
    library.digest(KEY, MEMORY, pieces, labels_of(len(units)), found)
    assert np.array_equal(found, reference_hashes(KEY, MEMORY, pieces, labels_of(len(units))))


@settings(max_examples=60, deadline=None)
@given(units=units, gap=st.integers(0, 70))
def test_every_library_copies_just_the_pieces_and_hashes_them(
    library: KVDigestLibrary, units: list[list[tuple[int, int]]], gap: int
) -> None:
    pieces = pieces_of(*units)
    starts = np.cumsum(np.append(gap, pieces.lengths + gap))
    into = starts[:-1].astype(np.int64)
    target = np.full(int(starts[-1]) + 64, 99, np.uint8)
    expected = target.copy()
    for at, offset, length in zip(into, pieces.offsets, pieces.lengths, strict=True):
        expected[at : at + length] = MEMORY[offset : offset + length]
    found = np.empty((len(units), 16), np.uint8)
    library.copy_and_digest(KEY, target, into, MEMORY, pieces, labels_of(len(units)), found)
    assert np.array_equal(target, expected)
    assert np.array_equal(found, reference_hashes(KEY, MEMORY, pieces, labels_of(len(units))))


@pytest.mark.parametrize("shift", [0, 1])
def test_a_copy_past_the_caches(library: KVDigestLibrary, shift: int) -> None:
    """Of 32 MiB and more; targets that are not aligned go through the caches all the same."""
    source = np.tile(MEMORY, (33 << 20) // MEMORY.size)
    source[::4099] ^= 1
    target = np.zeros(source.size + 128, np.uint8)
    begin = -target.ctypes.data % 64 + shift
    pieces = pieces_of([(0, 32 << 20)], [(32 << 20, source.size - (32 << 20) - 7)])
    found = np.empty((2, 16), np.uint8)
    into = pieces.offsets + begin
    library.copy_and_digest(KEY, target, into, source, pieces, labels_of(2), found)
    assert np.array_equal(target[begin : begin + source.size - 7], source[:-7])
    assert not target[:begin].any()
    assert not target[begin + source.size - 7 :].any()
    assert np.array_equal(found, reference_hashes(KEY, source, pieces, labels_of(2)))


@settings(max_examples=200, deadline=None)
@given(length=st.integers(1, 3 * CHUNK), data=st.data())
def test_a_flipped_bit_is_another_hash(length: int, data: st.DataObject) -> None:
    memory = MEMORY[:length].copy()
    before = hash_of(memory)
    memory[data.draw(st.integers(0, length - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert hash_of(memory) != before


@pytest.mark.parametrize("size", [1, 2, 4, 8, LINE_BYTES, CHUNK], ids=lambda size: f"{size} bytes")
@pytest.mark.parametrize("apart", [1, 2, 3])
def test_swapped_parts_are_another_hash(size: int, apart: int) -> None:
    memory = MEMORY.copy()
    parts = memory.reshape(-1, size)
    first = 0 if size == CHUNK else 9
    parts[[first, first + apart]] = parts[[first + apart, first]]
    assert not np.array_equal(memory, MEMORY)
    assert hash_of(memory) != hash_of(MEMORY)


@pytest.mark.parametrize("bit", [0, 77, 511])
@pytest.mark.parametrize("length", [0, 10, CHUNK - 64, CHUNK])
def test_another_label_is_another_hash(bit: int, length: int) -> None:
    other = LABEL.copy()
    other[bit // 8] ^= 1 << bit % 8
    assert hash_of(MEMORY[:length], label=other) != hash_of(MEMORY[:length])


def test_a_label_is_not_part_of_the_bytes() -> None:
    data = np.concatenate([MEMORY[:64], LABEL])
    assert hash_of(data[:64]) != hash_of(data)
    assert hash_of(data[:64]) != hash_of(data[:0], label=data[:64])


def test_zeros_of_any_length_differ() -> None:
    zeros = np.zeros(3 * CHUNK, np.uint8)
    found = {hash_of(zeros[:length]) for length in [*range(70), CHUNK, CHUNK + 1, 3 * CHUNK]}
    assert len(found) == 73


def test_one_key_says_nothing_of_another() -> None:
    """Who knows a key can make two units of one hash: they differ under every other key."""
    keys = np.frombuffer(KEY, "<u4", 66 * 16).reshape(66, 16)
    one = MEMORY[:CHUNK].copy().view("<u4").reshape(CHUNK_LINES, 16)
    one[10:12, 1] = 0 - keys[11:13, 1]  # keyed high words 0: nothing is left of low word 10
    other = one.copy()
    other[10, 0] += 1
    assert hash_of(one.view(np.uint8).ravel()) == hash_of(other.view(np.uint8).ravel())
    for secret in (b"", b"secret2", b"Secret"):
        key = expand_key(secret)
        assert hash_of(one.view(np.uint8).ravel(), key) != hash_of(
            other.view(np.uint8).ravel(), key
        )


@pytest.mark.parametrize(
    ("offset", "length", "end"),
    [
        (-1, 1, 1),
        (0, -1, 1),
        (MEMORY.size, 1, 1),
        (1, MEMORY.size, 1),
        (2**62, 2**62, 1),
        (0, 1, 2),
        (0, 1, 0),
        (0, 1, -1),
    ],
)
@pytest.mark.parametrize("compiled", [True, False])
def test_pieces_outside_of_memory_are_refused(
    offset: int, length: int, end: int, compiled: bool, request: pytest.FixtureRequest
) -> None:
    if not compiled:
        request.getfixturevalue("no_compiler")
    wrong = Pieces(*(np.array([value], np.int64) for value in (offset, length, end)))
    with pytest.raises(ValueError, match=r"outside|end, in order"):
        hash_units(KEY, MEMORY, wrong, LABEL[None])
    target = np.zeros_like(MEMORY)
    with pytest.raises(ValueError, match=r"outside|end, in order"):
        copy_and_hash(KEY, target, np.zeros(1, np.int64), MEMORY, wrong, LABEL[None])
    if end == 1:
        good = pieces_of([(0, max(length, 1))])._replace(lengths=np.array([length], np.int64))
        with pytest.raises(ValueError, match="outside"):
            copy_and_hash(KEY, target, wrong.offsets, MEMORY, good, LABEL[None])
    assert not target.any()


@pytest.mark.usefixtures("no_compiler")
def test_numpy_does_it_where_there_is_no_compiler() -> None:
    assert not is_native()
    pieces = pieces_of([(3, 100), (5000, CHUNK)], [(0, 9)])
    expected = reference_hashes(KEY, MEMORY, pieces, labels_of(2))
    assert np.array_equal(hash_units(KEY, MEMORY, pieces, labels_of(2)), expected)
    target = np.zeros(2 * CHUNK, np.uint8)
    into = np.array([10, 200, 1], np.int64)
    assert np.array_equal(copy_and_hash(KEY, target, into, MEMORY, pieces, labels_of(2)), expected)
    assert np.array_equal(target[200 : 200 + CHUNK], MEMORY[5000 : 5000 + CHUNK])


def test_no_units_have_no_hashes() -> None:
    assert hash_units(KEY, MEMORY, pieces_of(), labels_of(0)).shape == (0, 16)
