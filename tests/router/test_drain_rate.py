import pytest

from baton.core.clock import ManualClock
from baton.router.drain_rate import DrainRate


def serve(rate: DrainRate, clock: ManualClock, requests: int, seconds: float) -> None:
    for _ in range(requests):
        clock.advance(seconds)
        rate.took(100)


def test_it_is_known_after_a_few_requests_and_follows_what_is_new():
    clock = ManualClock()
    rate = DrainRate(clock)
    rate.waits(True)
    serve(rate, clock, 3, 1.0)
    assert rate.tokens_per_s() is None
    serve(rate, clock, 30, 1.0)
    assert rate.tokens_per_s() == pytest.approx(100, rel=0.1)
    serve(rate, clock, 300, 0.5)
    assert rate.tokens_per_s() == pytest.approx(200, rel=0.1)


def test_time_in_which_nobody_waits_does_not_count():
    clock = ManualClock()
    rate = DrainRate(clock)
    rate.waits(True)
    serve(rate, clock, 20, 1.0)
    before = rate.tokens_per_s()
    rate.waits(False)
    clock.advance(1000)
    rate.took(10_000)  # it did not wait
    assert rate.tokens_per_s() == before


def test_it_falls_while_nothing_is_taken():
    clock = ManualClock()
    rate = DrainRate(clock)
    rate.waits(True)
    serve(rate, clock, 20, 1.0)
    before = rate.tokens_per_s()
    clock.advance(30)
    assert rate.tokens_per_s() < before / 2
