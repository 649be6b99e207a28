"""The traces of the requests that ended last."""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace

from baton.core.trace import RequestTrace

_GAPS_KEPT = 1024
"""Of each request; metrics have counted them all, and a long answer has very many."""


class TraceLog:
    """A ring of traces by request id."""

    def __init__(self, kept: int) -> None:
        self._kept = kept
        self._traces: OrderedDict[str, RequestTrace] = OrderedDict()

    def add(self, trace: RequestTrace) -> None:
        """Keep a trace, and forget the oldest if there are too many."""
        self._traces[trace.request_id] = replace(trace, itl_s=trace.itl_s[:_GAPS_KEPT])
        if len(self._traces) > self._kept:
            self._traces.popitem(last=False)

    def get(self, request_id: str) -> RequestTrace | None:
        """Return a trace, or None if there is none (any more)."""
        return self._traces.get(request_id)

    def latest(self) -> Iterator[RequestTrace]:
        """Yield all that are kept, the last one first."""
        return reversed(self._traces.values())

    def __len__(self) -> int:
        return len(self._traces)
