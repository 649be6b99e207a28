import hashlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from baton.core.hashing import DIGESTS, HASH_BYTES, chain_hashes, hash_bytes, sha256_bytes

tokens = st.lists(st.integers(0, 2**32 - 1), max_size=40)
sizes = st.sampled_from([1, 3, 8])
ROOT = b"tenant"


def test_hashes_are_those_of_xxh3_128():
    # The published test vectors: of nothing, and of "a" with seed 0.
    assert hash_bytes().hex() == "99aa06d3014798d86001c324468d497f"
    assert hash_bytes(b"a").hex() == "a96faf705af16834e6c632b61e964e1f"


@given(st.lists(st.binary(max_size=20), max_size=6))
def test_parts_are_hashed_as_one(parts: list[bytes]):
    assert hash_bytes(*parts) == hash_bytes(b"".join(parts))
    assert hash_bytes(*(memoryview(p) for p in parts)) == hash_bytes(*parts)
    assert len(hash_bytes(*parts)) == HASH_BYTES


def test_arrays_are_hashed_without_a_copy():
    array = np.arange(100, dtype=np.float32)
    assert hash_bytes(array) == hash_bytes(array.tobytes())


@given(tokens, sizes)
def test_one_hash_per_begun_block(ids: list[int], size: int):
    hashes = chain_hashes(ids, size, ROOT)
    assert len(hashes) == -(-len(ids) // size)
    assert len(set(hashes)) == len(hashes)


@given(tokens, sizes, st.integers(0, 40))
def test_a_common_prefix_has_common_hashes(ids: list[int], size: int, length: int):
    whole, part = chain_hashes(ids, size, ROOT), chain_hashes(ids[:length], size, ROOT)
    full_blocks = min(length, len(ids)) // size
    assert whole[:full_blocks] == part[:full_blocks]


@given(tokens.filter(bool), sizes, st.data())
def test_a_changed_token_changes_all_hashes_from_its_block_on(
    ids: list[int], size: int, data: st.DataObject
):
    index = data.draw(st.integers(0, len(ids) - 1))
    other = [*ids]
    other[index] ^= 1 << data.draw(st.integers(0, 31))
    first, second = chain_hashes(ids, size, ROOT), chain_hashes(other, size, ROOT)
    block = index // size
    assert first[:block] == second[:block]
    assert all(a != b for a, b in zip(first[block:], second[block:], strict=True))


@given(tokens.filter(bool), sizes)
def test_another_root_shares_nothing(ids: list[int], size: int):
    assert not set(chain_hashes(ids, size, ROOT)) & set(chain_hashes(ids, size, b"other"))


def test_lists_and_tuples_hash_alike():
    assert chain_hashes([1, 2, 3], 2, ROOT) == chain_hashes((1, 2, 3), 2, ROOT)


@given(tokens, sizes, st.integers(0, 10), st.sampled_from(sorted(DIGESTS)))
def test_a_chain_goes_on_where_it_ended(ids: list[int], size: int, blocks: int, name: str):
    digest = DIGESTS[name]
    whole = chain_hashes(ids, size, ROOT, digest)
    begun = chain_hashes(ids[: blocks * size], size, ROOT, digest)
    rest = chain_hashes(ids[blocks * size :], size, begun[-1] if begun else ROOT, digest)
    assert begun + rest == whole


def test_sha256_is_sha256():
    assert sha256_bytes(b"a", b"bc") == hashlib.sha256(b"abc").digest()
    assert chain_hashes([1], 8, b"", sha256_bytes) == [hashlib.sha256(b"\1\0\0\0").digest()]
