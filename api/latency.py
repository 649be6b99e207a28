"""How long requests take lately: what a pool is sized by."""

import math
from collections import deque
from collections.abc import Iterable

from baton.core.clock import Clock
from baton.core.trace import RequestTrace

_WINDOW_S = 60.0
_KEPT = 512
"""Requests at most."""
_SHARE = 0.9


class RecentLatency:
    """Percentiles over the requests that ended in the last minute, at most the last 512."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._ended: deque[tuple[float, RequestTrace]] = deque(maxlen=_KEPT)

    def __len__(self) -> int:
        return len(self._ended)

    def add(self, trace: RequestTrace) -> None:
        """Take in a request that has ended."""
        self._ended.append((self._clock(), trace))

    def ttft_s(self) -> float | None:
        """Return the 90th percentile of time to first token; None if no request ended lately."""
        return _percentile(t.ttft_s for t in self._recent() if t.output_tokens > 0)

    def tpot_s(self) -> float | None:
        """Return the 90th percentile of time per later token; None likewise."""
        return _percentile(t.tpot_s for t in self._recent() if t.output_tokens > 1)

    def summary(self) -> dict[str, dict[str, float] | int]:
        """Return how many requests ended in the last minute, and percentiles of their times."""
        recent = list(self._recent())
        ttft = [t.ttft_s for t in recent if t.output_tokens > 0]
        tpot = [t.tpot_s for t in recent if t.output_tokens > 1]
        return {"requests": len(recent), "ttft_s": _spread(ttft), "tpot_s": _spread(tpot)}

    def _recent(self) -> Iterable[RequestTrace]:
        begin = self._clock() - _WINDOW_S
        while self._ended and self._ended[0][0] < begin:
            self._ended.popleft()
        return (trace for _, trace in self._ended)


def _percentile(values: Iterable[float], share: float = _SHARE) -> float | None:
    """Return the value at nearest rank."""
    ordered = sorted(values)
    return ordered[math.ceil(share * len(ordered)) - 1] if ordered else None


def _spread(values: list[float]) -> dict[str, float]:
    """Return the percentiles that are shown, by name; none if there are no values."""
    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
    return {n: v for n, s in shares.items() if (v := _percentile(values, s)) is not None}
