"""A table from block hashes to rows, of a size that is fixed at the start.

A key has two buckets of sixteen rows, drawn from its two halves, and lies in one of the two. So
a search looks at four cache lines, nothing ever moves, no row has to be marked as "was used", and
with eight rows in ten used hardly a key finds both of its buckets full. The one that does takes
the place of the key there that was of use to nobody for the longest time: the table is a cache.

    key ── high half ──▶ bucket 17  [k k k . k k k k …]
        └─ low half ───▶ bucket 940 [k . k k . . k . …]  ◀── the emptier one takes it

Everything works on whole arrays of keys at a time; a hash's first eight bytes are its key.
Two choices: Azar, Broder, Karlin, Upfal, "Balanced allocations", 1994.
"""

import numpy as np
from numpy.typing import NDArray

from baton.core.instance_events import KEY_BYTES

Keys = NDArray[np.uint64]
Rows = NDArray[np.int64]

WAYS = 16
"""Rows in a bucket: their keys fill two cache lines."""
_FILL = 0.8
"""Share of the rows that `blocks` keys use: fuller, and searches for room begin to fail."""
_NONE = np.uint64(0)
_HALF = np.uint64(32)
_LOW = np.uint64(0xFFFF_FFFF)


def keys_of(hashes: list[bytes]) -> Keys:
    """Return the keys of block hashes: their first eight bytes, and never 0."""
    return keys_from_bytes(b"".join(value[:KEY_BYTES] for value in hashes))


def keys_from_bytes(keys: bytes) -> Keys:
    """Return the keys that an instance tells of, eight bytes each."""
    return _never_zero(np.frombuffer(keys, dtype="<u8").astype(np.uint64))


def _never_zero(keys: Keys) -> Keys:
    keys[keys == _NONE] = 1
    return keys


class BlockTable:
    """Which row a key has. Rows are numbers, for whoever keeps more about a key in arrays."""

    def __init__(self, blocks: int) -> None:
        """Have room for `blocks` keys."""
        assert blocks > 0, blocks
        self._buckets = max(2, -int(-blocks // (WAYS * _FILL)))
        self.rows = self._buckets * WAYS
        """Rows that there are; a row is below it."""
        self.used = 0
        """Rows that hold a key."""
        self.keys: Keys = np.zeros(self.rows, np.uint64)
        """By row; 0: none."""
        self._by_bucket = self.keys.reshape(self._buckets, WAYS)
        self._stamps = np.zeros((self._buckets, WAYS), np.uint8)
        """When a row was last of use, on a clock of 256 that goes on as the table is filled."""
        self._now = 0
        self._until_tick = self._ticks = max(1, self.rows // 64)

    def __repr__(self) -> str:
        return f"<BlockTable {self.used} of {self.rows} rows>"

    def __len__(self) -> int:
        return self.used

    @property
    def nbytes(self) -> int:
        """Bytes that the table takes, filled or not."""
        return self.keys.nbytes + self._stamps.nbytes

    def find(self, keys: Keys) -> Rows:
        """Return the row of each key, -1 where there is none. Changes nothing."""
        first, second = self._buckets_of(keys)
        wanted = keys[:, None]
        at_first = self._by_bucket[first] == wanted
        at_second = self._by_bucket[second] == wanted
        return np.where(
            at_first.any(1),
            first * WAYS + at_first.argmax(1),
            np.where(at_second.any(1), second * WAYS + at_second.argmax(1), -1),
        )

    def touch(self, rows: Rows) -> None:
        """Note that rows were of use just now."""
        self._stamps.reshape(-1)[rows] = self._now

    def insert(self, keys: Keys) -> tuple[Rows, Rows, Keys]:
        """Give each of `keys`, which are in no row and differ, a row.

        Returns the rows; and the rows that were taken from other keys, with those keys. Of very
        many keys for one bucket some may get a row that a later one takes: it is -1 then.
        """
        rows: Rows = np.full(len(keys), -1, np.int64)
        lost_rows: list[Rows] = []
        lost_keys: list[Keys] = []
        pending = np.arange(len(keys))
        for _ in range(2 * WAYS):
            if not len(pending):
                break
            wanted = keys[pending]
            place = self._place(wanted)
            before = self.keys[place].copy()
            self.keys[place] = wanted  # of several with the same place the last one has it
            won = self.keys[place] == wanted
            taken = won & (before != _NONE)
            lost_rows.append(place[taken])
            lost_keys.append(before[taken])
            self.used += int(won.sum() - taken.sum())
            rows[pending[won]] = place[won]
            self.touch(place[won])
            pending = pending[~won]
        self._tick(len(keys))
        rows[rows >= 0] = np.where(
            self.keys[rows[rows >= 0]] == keys[rows >= 0], rows[rows >= 0], -1
        )
        return (
            rows,
            np.concatenate(lost_rows or [rows[:0]]),
            np.concatenate(lost_keys or [keys[:0]]),
        )

    def drop(self, rows: Rows) -> None:
        """Free rows, which hold keys and differ."""
        self.keys[rows] = _NONE
        self.used -= len(rows)

    def _buckets_of(self, keys: Keys) -> tuple[Rows, Rows]:
        """Return two buckets per key, each by a multiplication instead of a division."""
        count = np.uint64(self._buckets)
        first = ((keys >> _HALF) * count) >> _HALF
        second = ((keys & _LOW) * count) >> _HALF
        return first.astype(np.int64), second.astype(np.int64)

    def _place(self, keys: Keys) -> Rows:
        """Return a free row per key, in the emptier bucket; else the one that is longest unused."""
        first, second = self._buckets_of(keys)
        free_first = self._by_bucket[first] == _NONE
        free_second = self._by_bucket[second] == _NONE
        other = free_second.sum(1) > free_first.sum(1)
        bucket = np.where(other, second, first)
        free = np.where(other[:, None], free_second, free_first)
        rows: Rows = bucket * WAYS + free.argmax(1)
        full = ~free.any(1)
        if full.any():
            both = np.concatenate(
                [
                    first[full, None] * WAYS + np.arange(WAYS),
                    second[full, None] * WAYS + np.arange(WAYS),
                ],
                axis=1,
            )
            ages = np.uint8(self._now) - self._stamps.reshape(-1)[both]
            rows[full] = np.take_along_axis(both, ages.argmax(1)[:, None], 1)[:, 0]
        return rows

    def _tick(self, inserted: int) -> None:
        self._until_tick -= inserted
        while self._until_tick <= 0:
            self._until_tick += self._ticks
            self._now = (self._now + 1) % 256

    def check(self) -> None:
        """Assert that every key lies in one of its buckets, and in one row only."""
        rows = np.flatnonzero(self.keys)
        keys = self.keys[rows]
        assert len(rows) == self.used, (len(rows), self.used)
        assert len(np.unique(keys)) == len(keys), "a key has two rows"
        assert (self.find(keys) == rows).all(), "a key is where nobody looks for it"
