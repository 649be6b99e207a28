"""Who has which KV block: an index of bounded memory, fed by the events of both pools.

A *holder* is the cache of one instance (of one of its partitions), known by a small number. Each
block has four places for holders; the prefix that very many share (a system prompt) has the rest
of its holders in a bit mask beside the table, and there are only so many of these.

    row of a block   [key, 8 bytes] [holder, holder, holder, holder: 2 bytes each] [stamp, 1 byte]

A holder that is gone is forgotten at once, and its number is not given to another until a sweep,
in portions, has taken it out of every row.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from baton.router.block_table import BlockTable, Keys, Rows

Depths = NDArray[np.int32]

_INLINE = 4
_MOST_HOLDERS = (1 << 16) - 1
_WIDE_SHARE = 1 / 64
"""Of the blocks, so many may have more than four holders."""
_SWEEP_ROWS = 1 << 15
"""Rows swept at a time: about a millisecond."""


@dataclass(frozen=True, slots=True)
class IndexStats:
    """A snapshot."""

    blocks: int
    """That are known."""
    holders: int
    wide_blocks: int
    """Blocks with more than four holders."""
    nbytes: int
    """Bytes of the arrays, filled or not."""
    evicted: int
    """Blocks that had to go for others: the index was too small."""
    untold: int
    """Holders of popular blocks for which there was no room any more."""
    retired: int
    """Holders that are gone and not swept out yet."""


class BlockIndex:
    """Blocks to holders. Knowing too little only makes whoever asks blind, never wrong."""

    def __init__(self, blocks: int) -> None:
        """Have room for `blocks` blocks."""
        self._table = BlockTable(blocks)
        self._holders: NDArray[np.uint16] = np.zeros((self._table.rows, _INLINE), np.uint16)
        """By row, holder + 1; 0: none."""
        self._wide: dict[int, int] = {}
        """By key, a mask of the holders that have no place in the row; only where it is full."""
        self._most_wide = max(16, int(blocks * _WIDE_SHARE))
        self._alive = 0
        """A mask of the holders that count."""
        self._retired: set[int] = set()
        """Gone, and perhaps still in rows."""
        self._sweeping: frozenset[int] = frozenset()
        self._sweep: Iterator[None] | None = None
        self._highest = 0
        self._free: list[int] = []
        self._evicted = self._untold = 0

    def __repr__(self) -> str:
        return f"<BlockIndex {len(self._table)} blocks, {self._alive.bit_count()} holders>"

    # ---- holders ----------------------------------------------------------------------------

    def new_holder(self) -> int | None:
        """Return the number of a new holder, which has nothing yet; None if there is none left."""
        if self._free:
            holder = min(self._free)
            self._free.remove(holder)
        elif self._highest < _MOST_HOLDERS:
            holder = self._highest
            self._highest += 1
        else:
            return None
        self._alive |= 1 << holder
        return holder

    def retire(self, holder: int) -> None:
        """Forget a holder at once, and all that it has in the course of `sweep`."""
        assert self._alive >> holder & 1, f"{holder} is no holder"
        self._alive &= ~(1 << holder)
        self._retired.add(holder)

    @property
    def capacity(self) -> int:
        """How many numbers of holders have been in use: the length of what `depths` returns."""
        return self._highest

    # ---- what they have ---------------------------------------------------------------------

    def stored(self, holder: int, keys: Keys) -> None:
        """Note that a holder has blocks now."""
        keys = np.unique(keys)
        rows = self._table.find(keys)
        missing = rows < 0
        if missing.any():
            rows[missing] = self._insert(keys[missing])
            keys, rows = keys[rows >= 0], rows[rows >= 0]
        self._table.touch(rows)
        held = self._holders[rows]
        lacks = ~(held == holder + 1).any(1)
        rows, keys, held = rows[lacks], keys[lacks], held[lacks]
        free = held == 0
        roomy = free.any(1)
        self._holders[rows[roomy], free[roomy].argmax(1)] = holder + 1
        for key in keys[~roomy].tolist():
            self._widen(key, holder)

    def removed(self, holder: int, keys: Keys) -> None:
        """Note that a holder has blocks no more."""
        keys = np.unique(keys)
        rows = self._table.find(keys)
        keys, rows = keys[rows >= 0], rows[rows >= 0]
        inline = self._holders[rows] == holder + 1
        places = inline.any(1)
        if self._wide:
            for key in keys[~places].tolist():
                self._narrow(key, holder)
        self._empty(rows[places], inline[places].argmax(1), keys[places])

    def depths(self, keys: Keys) -> Depths:
        """Return, by holder, how many of a prompt's blocks it has, from the first without a gap.

        `keys` are those of the prompt's chained hashes, in order.
        """
        depths: Depths = np.zeros(self._highest, np.int32)
        rows = self._table.find(keys)
        gaps = np.flatnonzero(rows < 0)
        rows = rows[: gaps[0]] if len(gaps) else rows
        self._table.touch(rows)
        have = self._alive if len(rows) else 0
        for first, mask in self._runs(keys, rows):
            gone = have & ~mask
            if gone:
                depths[self._members(gone)] = first
                have &= mask
                if not have:
                    break
        if have:
            depths[self._members(have)] = len(rows)
        return depths

    def _runs(self, keys: Keys, rows: Rows) -> Iterator[tuple[int, int]]:
        """Yield where the holders change along a prompt, and the mask of those from there on."""
        held = self._holders[rows]
        changes = np.empty(len(rows), bool)
        changes[:1] = True
        changes[1:] = (held[1:] != held[:-1]).any(1)
        if self._wide:
            changes |= (held != 0).all(1)
        for place in np.flatnonzero(changes).tolist():
            mask = 0
            for holder in held[place].tolist():
                mask |= 1 << holder - 1 if holder else 0
            yield place, mask | self._wide.get(int(keys[place]), 0)

    def _members(self, mask: int) -> NDArray[np.int64]:
        data = np.frombuffer(mask.to_bytes(-(-self._highest // 8), "little"), np.uint8)
        return np.flatnonzero(np.unpackbits(data, bitorder="little"))

    # ---- rows -------------------------------------------------------------------------------

    def _insert(self, keys: Keys) -> Rows:
        rows, lost_rows, lost_keys = self._table.insert(keys)
        self._evicted += len(lost_rows) + int((rows < 0).sum())
        self._holders[lost_rows] = 0
        if self._wide:
            for key in lost_keys.tolist():
                self._wide.pop(key, None)
        return rows

    def _widen(self, key: int, holder: int) -> None:
        if key in self._wide or len(self._wide) < self._most_wide:
            self._wide[key] = self._wide.get(key, 0) | 1 << holder
        else:
            self._untold += 1

    def _narrow(self, key: int, holders: int) -> None:
        mask = self._wide.get(key, 0) & ~(1 << holders)
        self._set_wide(key, mask)

    def _set_wide(self, key: int, mask: int) -> None:
        if mask:
            self._wide[key] = mask
        else:
            self._wide.pop(key, None)

    def _empty(self, rows: Rows, places: Rows, keys: Keys) -> None:
        """Clear one place of each row; who has none in a popular block gets it."""
        self._holders[rows, places] = 0
        if self._wide:
            for row, place, key in zip(rows.tolist(), places.tolist(), keys.tolist(), strict=True):
                self._refill(row, place, key)
        empty = ~self._holders[rows].any(1)
        self._table.drop(np.unique(rows[empty]))

    def _refill(self, row: int, place: int, key: int) -> None:
        mask = self._wide.get(key, 0)
        if mask:
            lowest = mask & -mask
            self._holders[row, place] = lowest.bit_length()
            self._set_wide(key, mask & ~lowest)

    # ---- the sweep --------------------------------------------------------------------------

    def sweep(self) -> bool:
        """Take those that are gone out of one more portion; return whether there is more to do."""
        if self._sweep is None:
            if not self._retired:
                return False
            self._sweeping = frozenset(self._retired)
            self._sweep = self._portions(self._sweeping)
        if next(self._sweep, self) is self:
            self._retired -= self._sweeping
            self._free += self._sweeping
            self._sweep = None
        return bool(self._retired)

    def _portions(self, gone: frozenset[int]) -> Iterator[None]:
        mask = sum(1 << holder for holder in gone)
        wide = list(self._wide)
        for start in range(0, len(wide), _SWEEP_ROWS // 16):
            for key in wide[start : start + _SWEEP_ROWS // 16]:
                if key in self._wide:
                    self._set_wide(key, self._wide[key] & ~mask)
            yield
        is_gone = np.zeros(_MOST_HOLDERS + 1, bool)
        is_gone[[holder + 1 for holder in gone]] = True
        for start in range(0, self._table.rows, _SWEEP_ROWS):
            rows, places = np.nonzero(is_gone[self._holders[start : start + _SWEEP_ROWS]])
            if len(rows):
                rows += start
                self._empty(rows, places, self._table.keys[rows])
            yield

    def stats(self) -> IndexStats:
        """Return a snapshot."""
        return IndexStats(
            blocks=len(self._table),
            holders=self._alive.bit_count(),
            wide_blocks=len(self._wide),
            nbytes=self._table.nbytes + self._holders.nbytes,
            evicted=self._evicted,
            untold=self._untold,
            retired=len(self._retired),
        )

    def check(self) -> None:
        """Assert that rows and masks agree."""
        self._table.check()
        used = self._table.keys != 0
        assert (self._holders.any(1) == used).all(), "a row without a holder, or without a key"
        numbers = np.sort(self._holders[used].astype(np.int64), axis=1)
        twice = (numbers[:, 1:] == numbers[:, :-1]) & (numbers[:, 1:] != 0)
        assert not twice.any(), "a holder twice in a row"
        for key, mask in self._wide.items():
            [row] = self._table.find(np.array([key], np.uint64)).tolist()
            assert row >= 0, "a mask without a row"
            inline = self._holders[row].tolist()
            assert all(inline), "a mask beside a row with room"
            assert not any(mask >> holder - 1 & 1 for holder in inline), "told twice"
        known = (self._alive | sum(1 << holder for holder in self._retired)) << 1 | 1
        there = np.unique(self._holders[used]).tolist()
        assert all(known >> number & 1 for number in there), "a holder that nobody knows"
