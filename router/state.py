"""What a router goes by: loads and caches as instances tell of them, and its own open work.

One row per instance, in one array, so that a thousand candidates are weighed in a few operations.
What an instance reports is a moment old: what this router has sent there since is added to it, and
what of its own has ended there since is taken off.
Of an instance that reports nothing there is only what this router has open there.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from baton.core.hashing import DIGESTS, chain_hashes, prefix_root
from baton.core.instance_events import BlockChanges, CacheTerms, InstanceLoad
from baton.router.block_index import BlockIndex
from baton.router.block_table import keys_from_bytes, keys_of
from baton.router.load import InstanceKey, Load
from baton.router.regression import Vector

_LONGEST = 2048
"""Blocks of a prompt that are looked for; of what follows, nobody is taken to have any."""

# Columns: what is reported, what was sent since, what is open of this router, what is allowed.
SEEN, QUEUED, RUNNING, CONTEXT, FREE = range(5)
SENT_TOKENS, SENT_REQUESTS, SENT_CONTEXT = range(5, 8)
OWN_QUEUED, OWN_REQUESTS, OWN_CONTEXT = range(8, 11)
LOCAL = 11
_COLUMNS = 12
_REPORTED = slice(SEEN, FREE + 1)
_SENT = slice(SENT_TOKENS, SENT_CONTEXT + 1)
_OWN = slice(OWN_QUEUED, OWN_CONTEXT + 1)


@dataclass(slots=True)
class _Followed:
    """The stream of one instance."""

    terms: CacheTerms
    holders: dict[int, int] = field(default_factory=dict)
    """By partition."""
    next_event: dict[int, int] = field(default_factory=dict)


class RouterState:
    """Events in; arrays for the policy out. `version` counts the events."""

    def __init__(self, index_blocks: int) -> None:
        """`index_blocks`: of so many blocks is known who has them."""
        self.version = 0
        self.index = BlockIndex(index_blocks)
        self._rows: dict[InstanceKey, int] = {}
        self._table: Vector = np.zeros((16, _COLUMNS))
        self._followed: dict[InstanceKey, _Followed] = {}
        self._spoken: Counter[tuple[int, str]] = Counter()
        """How many name blocks so: block size and hash."""
        self._row_of_holder: NDArray[np.int64] = np.full(64, -1, np.int64)

    def __repr__(self) -> str:
        return f"RouterState(version={self.version}, {len(self._rows)} rows, {self.index!r})"

    # ---- what instances tell ----------------------------------------------------------------

    def opened(self, key: InstanceKey, terms: CacheTerms) -> None:
        """An instance is about to tell of itself, from the beginning."""
        self.lost(key)
        self._followed[key] = _Followed(terms)
        self._spoken[terms.block_size, terms.hash_name] += 1
        self._values(key)[LOCAL] = terms.local_prefill

    def told(self, key: InstanceKey, load: InstanceLoad) -> None:
        """An instance tells its load."""
        self.version += 1
        row = self._values(key)
        row[_REPORTED] = 1, load.queued_tokens, load.running, load.context_tokens, load.free_tokens
        row[_SENT] = 0

    def changed(self, key: InstanceKey, changes: BlockChanges) -> bool:
        """An instance's cache has changed; False if something before is missing: begin anew."""
        self.version += 1
        followed = self._followed[key]
        partition = changes.partition
        if changes.complete:
            self._begin(key, followed, partition)
        elif followed.next_event.get(partition) != changes.first:
            return False
        followed.next_event[partition] = changes.first + changes.events
        holder = followed.holders.get(partition)
        if holder is not None:
            self.index.removed(holder, keys_from_bytes(changes.removed))
            self.index.stored(holder, keys_from_bytes(changes.stored))
        return True

    def lost(self, key: InstanceKey) -> None:
        """Nothing is heard of an instance any more: what it had is forgotten."""
        self.version += 1
        followed = self._followed.pop(key, None)
        if followed is not None:
            for holder in followed.holders.values():
                self._retire(holder)
            self._spoken[followed.terms.block_size, followed.terms.hash_name] -= 1
            self._spoken += Counter()  # drops what nobody speaks any more
        if key in self._rows:
            row = self._values(key)
            row[_REPORTED] = 0
            row[_SENT] = 0
            row[LOCAL] = 0

    def _begin(self, key: InstanceKey, followed: _Followed, partition: int) -> None:
        old = followed.holders.pop(partition, None)
        if old is not None:
            self._retire(old)
        holder = self.index.new_holder()
        if holder is None:
            return
        followed.holders[partition] = holder
        while holder >= len(self._row_of_holder):
            more = np.full(len(self._row_of_holder), -1, np.int64)
            self._row_of_holder = np.concatenate([self._row_of_holder, more])
        self._row_of_holder[holder] = self.row(key)

    def _retire(self, holder: int) -> None:
        self.index.retire(holder)
        self._row_of_holder[holder] = -1

    # ---- this router's own work -------------------------------------------------------------

    def own(
        self, key: InstanceKey, *, queued: int = 0, requests: int = 0, context: int = 0
    ) -> None:
        """Change what this router has open on an instance, by differences."""
        values = self._values(key)
        if queued or requests:
            values[_OWN] += queued, requests, context
        else:  # with every token: a number is added in a tenth of the time that a slice takes
            values[OWN_CONTEXT] += context

    def sent(
        self, key: InstanceKey, *, tokens: float = 0, requests: int = 0, context: int = 0
    ) -> None:
        """Note what was sent to an instance, or has ended there, and it has not told of yet."""
        self._values(key)[_SENT] += tokens, requests, context

    # ---- for the policy ---------------------------------------------------------------------

    def row(self, key: InstanceKey) -> int:
        """Return the row of an instance; a new one if it has none."""
        row = self._rows.get(key)
        if row is None:
            row = self._rows[key] = len(self._rows)
            if row == len(self._table):
                self._table = np.concatenate([self._table, np.zeros_like(self._table)])
        return row

    def _values(self, key: InstanceKey) -> Vector:
        """Return the row itself, to be changed; it is in the table as that is after this call."""
        row = self.row(key)
        values: Vector = self._table[row]
        return values

    def keep_only(self, keys: Collection[InstanceKey]) -> bool:
        """Give up rows of instances that are not named, if many are; return whether rows moved."""
        kept = [
            key
            for key, row in self._rows.items()
            if key in keys or key in self._followed or self._table[row, _OWN].any()
        ]
        if 2 * len(kept) >= len(self._rows) or len(self._rows) <= 16:
            return False
        old = [self._rows[key] for key in kept]
        self._table = np.concatenate([self._table[old], np.zeros((max(16, len(old)), _COLUMNS))])
        moved = {row: place for place, row in enumerate(old)}
        holders = self._row_of_holder
        self._row_of_holder = np.array([moved.get(int(row), -1) for row in holders], np.int64)
        self._rows = {key: place for place, key in enumerate(kept)}
        return True

    def loads(self, rows: NDArray[np.int64]) -> Vector:
        """Return the rows of these instances, by the columns named above."""
        return self._table[rows]

    def known_tokens(self, prompt: Sequence[int], tenant: str) -> Vector:
        """Return, by row, how many tokens of a prompt an instance has, from the first."""
        known = np.zeros(len(self._table))
        for block_size, name in self._spoken:
            blocks = min(_LONGEST, (len(prompt) - 1) // block_size)
            if not name or blocks <= 0:
                continue
            digest = DIGESTS[name]
            root = prefix_root(tenant, digest)
            keys = keys_of(chain_hashes(prompt[: blocks * block_size], block_size, root, digest))
            depths = self.index.depths(keys)
            holders = np.flatnonzero(depths)
            rows = self._row_of_holder[holders]
            np.maximum.at(known, rows, depths[holders] * float(block_size))
        return known

    def check_own(
        self, decode: Mapping[InstanceKey, Load], prefill: Mapping[InstanceKey, Load]
    ) -> None:
        """Assert that the columns of this router's own work say what its tables do."""
        for key, row in self._rows.items():
            here, there = decode.get(key, Load()), prefill.get(key, Load())
            own = (there.tokens, here.requests + there.requests, here.tokens)
            assert tuple(self._table[row, _OWN]) == own, (key, own)

    def check(self) -> None:
        """Assert that holders and rows belong together."""
        self.index.check()
        for key, followed in self._followed.items():
            for holder in followed.holders.values():
                assert self._row_of_holder[holder] == self._rows[key], (key, holder)
