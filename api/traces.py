"""The traces of the requests that ended last."""

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

from baton.core.trace import RequestTrace

_GAPS_KEPT = 1024
"""Of each request; metrics have counted them all, and a long answer has very many."""


@dataclass(frozen=True, slots=True)
class KeptTrace:
    """A trace, and when its request ended."""

    trace: RequestTrace
    ended_at: float
    """Unix time, in seconds."""


class TraceLog:
    """A ring of traces by request id."""

    def __init__(self, kept: int, now: Callable[[], float] = time.time) -> None:
        """`now` tells Unix time."""
        self._kept = kept
        self._now = now
        self._traces: OrderedDict[str, KeptTrace] = OrderedDict()

    def add(self, trace: RequestTrace) -> None:
        """Keep a trace, and forget the oldest if there are too many."""
        kept = replace(trace, itl_s=trace.itl_s[:_GAPS_KEPT])
        self._traces[trace.request_id] = KeptTrace(kept, self._now())
        if len(self._traces) > self._kept:
            self._traces.popitem(last=False)

    def get(self, request_id: str) -> RequestTrace | None:
        """Return a trace, or None if there is none (any more)."""
        kept = self._traces.get(request_id)
        return None if kept is None else kept.trace

    def newest(self, sees: Callable[[str], bool], limit: int) -> Iterator[KeptTrace]:
        """Yield those of tenants that `sees` says yes to, newest first, at most `limit`."""
        seen = (kept for kept in reversed(self._traces.values()) if sees(kept.trace.tenant))
        return islice(seen, limit)

    def latest(self) -> Iterator[RequestTrace]:
        """Yield all that are kept, the last one first."""
        return (kept.trace for kept in reversed(self._traces.values()))

    def __len__(self) -> int:
        return len(self._traces)
