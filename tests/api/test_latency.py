"""Percentiles of what ended lately."""

import pytest

from baton.api.latency import RecentLatency
from baton.core.clock import ManualClock
from baton.core.request import FinishReason
from baton.core.trace import RequestTrace


def trace(ttft_s: float, tpot_s: float, tokens: int = 9) -> RequestTrace:
    return RequestTrace(
        request_id="r",
        decode_instance="d",
        prompt_tokens=1,
        output_tokens=tokens,
        finish=FinishReason.STOP,
        ttft_s=ttft_s,
        tpot_s=tpot_s,
    )


def test_percentiles_are_of_the_last_minute() -> None:
    clock = ManualClock()
    recent = RecentLatency(clock)
    assert (recent.ttft_s(), recent.tpot_s()) == (None, None)
    for i in range(1, 11):
        recent.add(trace(float(i), i / 100))
    recent.add(trace(99.0, 99.0, tokens=0))
    assert (recent.ttft_s(), recent.tpot_s()) == pytest.approx((9.0, 0.09))
    clock.advance(40.0)
    recent.add(trace(0.5, 0.0, tokens=1))
    clock.advance(30.0)
    assert (recent.ttft_s(), recent.tpot_s()) == (0.5, None)
    clock.advance(40.0)
    assert recent.ttft_s() is None
    assert len(recent) == 0


def test_only_so_many_are_kept() -> None:
    recent = RecentLatency(ManualClock())
    for i in range(10_000):
        recent.add(trace(float(i), 0.1))
    assert len(recent) == 512
    assert recent.ttft_s() == 9948.0
