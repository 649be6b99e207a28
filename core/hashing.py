"""The home of xxhash, and hashes of token prefixes.

xxh3_128 is as fast as memory and guards against accidents, not against forgery; SHA-256 also
withstands somebody who looks for two prompts with the same hash.
"""

import hashlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import xxhash

HASH_BYTES = 16


class Buffer(Protocol):
    """Anything that hands out its bytes without a copy: bytes, memoryview, a numpy array."""

    def __buffer__(self, flags: int, /) -> memoryview: ...


class Digest(Protocol):
    """A hash function of parts one after the other."""

    def __call__(self, *parts: Buffer | bytes) -> bytes: ...


def hash_bytes(*parts: Buffer | bytes) -> bytes:
    """Return the xxh3_128 digest (16 bytes) of `parts` one after the other."""
    return xxhash.xxh3_128_digest(b"".join(parts))


def sha256_bytes(*parts: Buffer | bytes) -> bytes:
    """Return the SHA-256 digest (32 bytes) of `parts` one after the other."""
    state = hashlib.sha256()
    for part in parts:
        state.update(part)
    return state.digest()


DIGESTS: dict[str, Digest] = {"xxh3_128": hash_bytes, "sha256": sha256_bytes}
"""By the names that EngineConfig.prefix_hash allows."""


def prefix_root(tenant: str, digest: Digest = hash_bytes) -> bytes:
    """Return the hash that a tenant's prefixes begin with: other tenants never hit them."""
    return digest(b"baton prefix\0", tenant.encode())


def chain_hashes(
    tokens: Sequence[int], block_size: int, root: bytes, digest: Digest = hash_bytes
) -> list[bytes]:
    """Return, per block of `tokens`, a hash of all tokens up to that block's end.

    hash[i] = H(hash[i-1], tokens of block i), hash[-1] = root; the last block may be partial.
    A chain goes on where it ended: with the last full block's hash as the root of the next call.
    """
    data = np.asarray(tokens, dtype=np.uint32).tobytes()
    block_bytes = 4 * block_size
    hashes: list[bytes] = []
    parent = root
    for start in range(0, len(data), block_bytes):
        parent = digest(parent, data[start : start + block_bytes])
        hashes.append(parent)
    return hashes
