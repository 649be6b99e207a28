"""Which block holds the KV of which prefix: full blocks only, found by chained hashes.

    root(tenant) ──tokens 0..15──▶ hash 0 ──tokens 16..31──▶ hash 1 ──▶ …
                                     │                         │
                                  block 7                   block 3

Equal hashes mean equal prefixes, from the first token on, of the same tenant. A partial last block
has no hash, so nobody shares a block that is still written, and copy-on-write has nothing to copy.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from baton.core.handover import BlockRef
from baton.core.hashing import DIGESTS, chain_hashes, prefix_root
from baton.core.ids import BlockId
from baton.engine.kv_events import BlockRemoved, BlockStored, KVEventLog, KVEvents

_EVENTS = 1 << 16
"""Events kept for a reader; some seconds of a busy engine."""


@dataclass(frozen=True, slots=True)
class _Entry:
    ref: BlockRef
    hash: bytes
    parent: bytes


class PrefixCache:
    """An index from prefixes to blocks. Whose the blocks are is the block pool's affair."""

    def __init__(self, block_size: int, hash_name: str) -> None:
        """`hash_name` is a key of core.hashing.DIGESTS."""
        self._block_size = block_size
        self._digest = DIGESTS[hash_name]
        self._by_hash: dict[bytes, _Entry] = {}
        self._by_block: dict[BlockId, _Entry] = {}
        self._log = KVEventLog(_EVENTS)

    def __repr__(self) -> str:
        return f"<PrefixCache {len(self)} blocks, {self._log!r}>"

    def __len__(self) -> int:
        return len(self._by_hash)

    def root(self, tenant: str) -> bytes:
        """Return the hash that a tenant's prefixes begin with: other tenants never hit them."""
        return prefix_root(tenant, self._digest)

    def hashes(self, tokens: Sequence[int], parent: bytes) -> list[bytes]:
        """Return the chained hashes of `tokens`, whole blocks that follow on `parent`."""
        return chain_hashes(tokens, self._block_size, parent, self._digest)

    def match(self, hashes: Sequence[bytes]) -> list[BlockRef]:
        """Return the blocks of the longest known prefix of the one with these chained hashes."""
        found = []
        for value in hashes:
            entry = self._by_hash.get(value)
            if entry is None:
                break
            found.append(entry.ref)
        return found

    def insert(self, value: bytes, parent: bytes, ref: BlockRef) -> BlockRef:
        """Enter a block under its prefix's hash; return the one that holds it from now on.

        That is another one if two sequences computed the same prefix at the same time.
        """
        entry = self._by_hash.get(value)
        if entry is None:
            entry = self._by_hash[value] = self._by_block[ref.block] = _Entry(ref, value, parent)
            self._log.record(BlockStored(value, parent))
        return entry.ref

    def forget(self, block: BlockId) -> None:
        """Remove a block: its room is needed."""
        entry = self._by_block.pop(block)
        del self._by_hash[entry.hash]
        self._log.record(BlockRemoved(entry.hash, entry.parent))

    def drain_events(self) -> KVEvents:
        """Return what was stored and removed since the last call; see engine/kv_events.py."""
        return self._log.drain(self._contents)

    def hashes_there(self) -> Iterable[bytes]:
        """Return the hashes of all prefixes that can be found now."""
        return self._by_hash

    def check(self, eviction_order: Sequence[BlockId]) -> None:
        """Assert that the index is whole, and that children go before their parents."""
        assert {e.ref.block: e.hash for e in self._by_hash.values()} == {
            block: entry.hash for block, entry in self._by_block.items()
        }, "the two sides of the index differ"
        turn = {block: number for number, block in enumerate(eviction_order)}
        never = len(turn)
        for entry in self._by_hash.values():
            parent = self._by_hash.get(entry.parent)
            if parent is not None and parent.ref.block in turn:
                mine = turn.get(entry.ref.block, never)
                assert mine < turn[parent.ref.block], f"{parent} goes before {entry}"

    def blocks(self) -> set[BlockId]:
        """Return every block in the index."""
        return set(self._by_block)

    def _contents(self) -> Iterator[BlockStored]:
        """Tell of every block, each after its parent."""
        told: set[bytes] = set()
        for entry in self._by_hash.values():
            path = []
            current: _Entry | None = entry
            while current is not None and current.hash not in told:
                path.append(current)
                told.add(current.hash)
                current = self._by_hash.get(current.parent)
            for step in reversed(path):
                yield BlockStored(step.hash, step.parent)
