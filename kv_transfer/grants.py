"""What of a region each ticket opens, where the owner of the memory serves every read itself."""

import threading
from dataclasses import dataclass

import numpy as np

from baton.core.ids import Ticket
from baton.kernels.native.kv_digest import Ints


@dataclass(frozen=True, slots=True)
class _Opened:
    """Ranges of bytes, in order and apart from each other."""

    begins: Ints
    ends: Ints

    def with_more(self, begins: Ints, ends: Ints) -> "_Opened":
        begins, ends = np.concatenate([self.begins, begins]), np.concatenate([self.ends, ends])
        order = np.argsort(begins, kind="stable")
        begins, reach = begins[order], np.maximum.accumulate(ends[order])
        first = np.concatenate(([True], begins[1:] > reach[:-1]))
        last = np.concatenate((first[1:], [True]))
        return _Opened(begins[first], reach[last])

    def covers(self, begins: Ints, ends: Ints) -> bool:
        at = self.begins.searchsorted(begins, "right") - 1
        return bool(((at >= 0) & (ends <= self.ends[at])).all())


_NOTHING = _Opened(np.empty(0, np.int64), np.empty(0, np.int64))


class Grants:
    """The offered and unread part of a region, by ticket; from any thread."""

    def __init__(self) -> None:
        self.refused = 0
        """Reads of what was not granted, or not any more."""
        self._lock = threading.Lock()
        self._opened: dict[Ticket, _Opened] = {}

    def __repr__(self) -> str:
        return f"<Grants to {len(self._opened)} tickets, {self.refused} reads refused>"

    def grant(self, ticket: Ticket, offsets: Ints, lengths: Ints) -> None:
        """Let whoever has `ticket` read these runs too, until `revoke`."""
        if offsets.size:
            with self._lock:
                opened = self._opened.get(ticket, _NOTHING)
                self._opened[ticket] = opened.with_more(offsets, offsets + lengths)

    def revoke(self, ticket: Ticket) -> None:
        """Let nobody read by `ticket` any more; a read that is being served may still go on."""
        with self._lock:
            self._opened.pop(ticket, None)

    def allow(self, ticket: Ticket, offsets: Ints, lengths: Ints) -> bool:
        """Return whether `ticket` opens all of these runs, one at least; counts it if not."""
        with self._lock:
            opened = self._opened.get(ticket)
            if opened is not None and opened.covers(offsets, offsets + lengths):
                return True
            self.refused += 1
            return False

    @property
    def tickets(self) -> int:
        """How many open something."""
        return len(self._opened)
