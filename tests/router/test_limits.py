import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.core.clock import ManualClock
from baton.core.tenants import ANONYMOUS, Tenant
from baton.router.limits import TenantLimits, TokenBucket

STEPS = st.lists(st.tuples(st.floats(0, 90), st.integers(1, 400), st.integers(0, 400)), max_size=60)


@given(st.integers(60, 600), STEPS)
def test_no_more_is_let_through_than_the_rate_and_one_bucket(per_minute, steps):
    clock = ManualClock()
    bucket = TokenBucket(per_minute, clock)
    used = largest = 0.0
    for pause, guess, real in steps:
        clock.advance(pause)
        if bucket.seconds_until(guess) == 0:
            bucket.take(guess)
            bucket.take(real - guess)  # its real length is known at once
            used += real
            largest = max(largest, real)
        assert used <= per_minute + clock() * per_minute / 60 + largest + 1e-6


@given(st.integers(1, 600), STEPS, st.integers(1, 10_000))
def test_who_waits_for_as_long_as_told_is_let_through(per_minute, steps, tokens):
    clock = ManualClock()
    bucket = TokenBucket(per_minute, clock)
    for pause, guess, real in steps:
        clock.advance(pause)
        bucket.take(guess)
        bucket.take(real - guess)
    clock.advance(bucket.seconds_until(tokens))
    assert bucket.seconds_until(tokens) == pytest.approx(0, abs=1e-6)


def test_what_was_guessed_too_high_is_given_back():
    clock = ManualClock()
    bucket = TokenBucket(100, clock)
    bucket.take(80)
    assert bucket.seconds_until(50) == pytest.approx(18)
    bucket.take(-40)
    assert bucket.seconds_until(50) == 0


def test_a_new_rate_holds_from_now_on():
    clock = ManualClock()
    bucket = TokenBucket(100, clock)
    bucket.resize(10)
    assert bucket.seconds_until(10) == 0
    bucket.take(10)
    assert bucket.seconds_until(10) == pytest.approx(60)
    bucket.resize(100)
    assert bucket.seconds_until(10) == pytest.approx(6)


def test_a_tenant_starts_no_more_at_once_than_it_may():
    limits = TenantLimits(ManualClock())
    tenant = Tenant(name="a", max_concurrent=2)
    for _ in range(3):
        limits.came(tenant, 5)
    limits.started("a")
    assert limits.may_start("a")
    limits.started("a")
    assert not limits.may_start("a")
    limits.left("a", started=True, back=0)
    assert limits.may_start("a")
    limits.check({"a": 2}, {"a": 1})


def test_changed_limits_hold_at_the_next_request():
    limits = TenantLimits(ManualClock())
    limits.came(Tenant(name="a", max_concurrent=1), 5)
    limits.started("a")
    assert not limits.may_start("a")
    assert limits.seconds_until(Tenant(name="a", max_concurrent=2, tokens_per_minute=60), 60) == 0
    assert limits.may_start("a")


def test_nothing_is_kept_of_who_owes_nothing():
    clock = ManualClock()
    limits = TenantLimits(clock)
    limits.came(ANONYMOUS, 5)
    limits.left("", started=False, back=5)
    limits.came(Tenant(name="a", tokens_per_minute=10), 5)
    limits.left("a", started=False, back=5)
    assert len(limits) == 0
