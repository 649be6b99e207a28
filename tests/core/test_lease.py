"""The lease of an instance: who renews it, and when it ends."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.core.lease import Beat, Lease, Leave, Progress, Standing

FREE, HELD, FENCED = Standing.FREE, Standing.HELD, Standing.FENCED


def beat(granter: str = "gateway", epoch: int = 1, *, controls: bool = False) -> Beat:
    return Beat(granter, epoch, lease_s=3.0, controls=controls)


def test_nobody_has_ever_spoken_to_it() -> None:
    lease = Lease()
    assert lease.standing(1e9) is FREE
    assert lease.ends_at() is None


def test_it_ends_when_nobody_renews_it_and_begins_again_when_somebody_does() -> None:
    lease = Lease()
    assert lease.beat(beat(), 10.0)
    assert lease.standing(12.9) is HELD
    assert lease.ends_at() == 13.0
    assert lease.standing(13.0) is FENCED
    lease.beat(beat(), 20.0)
    assert lease.standing(22.0) is HELD


def test_any_granter_suffices() -> None:
    lease = Lease()
    lease.beat(beat("controller", controls=True), 0.0)
    lease.beat(beat("gateway"), 2.0)
    assert lease.granters(2.0) == ("controller", "gateway")
    assert lease.granters(4.0) == ("gateway",)
    assert lease.standing(4.0) is HELD
    assert lease.standing(5.0) is FENCED


def test_an_old_controller_counts_for_nothing() -> None:
    lease = Lease()
    lease.beat(beat("new", 7, controls=True), 0.0)
    assert not lease.beat(beat("old", 6, controls=True), 2.0)
    assert lease.standing(3.0) is FENCED
    # A gateway may be behind.
    assert lease.beat(beat("gateway", 5), 4.0)
    assert lease.epoch == 7
    assert lease.standing(5.0) is HELD


def test_after_the_last_goodbye_it_is_free() -> None:
    lease = Lease()
    lease.beat(beat("a"), 0.0)
    lease.beat(beat("b"), 0.0)
    lease.left(beat("a"), Leave.GOODBYE, 1.0)
    assert lease.standing(1.0) is HELD
    lease.left(beat("b"), Leave.GOODBYE, 1.0)
    assert lease.standing(100.0) is FREE


def test_a_goodbye_does_not_free_what_is_fenced() -> None:
    lease = Lease()
    lease.beat(beat("a"), 0.0)
    lease.left(beat("a"), Leave.GOODBYE, 5.0)
    assert lease.standing(5.0) is FENCED


def test_a_goodbye_leaves_no_grant_that_has_run_out_behind() -> None:
    lease = Lease()
    lease.beat(beat("gone"), 0.0)
    lease.beat(beat("a"), 2.0)
    lease.left(beat("a"), Leave.GOODBYE, 4.0)
    assert lease.standing(4.0) is FREE


def test_who_is_no_member_any_more_is_fenced_at_once() -> None:
    lease = Lease()
    lease.beat(beat("a"), 0.0)
    lease.left(beat("stranger"), Leave.WITHDRAW, 1.0)
    assert lease.standing(1.0) is HELD
    lease.left(beat("a"), Leave.WITHDRAW, 1.0)
    assert lease.standing(1.0) is FENCED
    lease.beat(beat("a", 2), 2.0)
    assert lease.standing(2.0) is HELD


def test_what_the_controller_takes_off_the_list_no_older_view_keeps_alive() -> None:
    lease = Lease()
    lease.beat(beat("controller", 7, controls=True), 0.0)
    lease.beat(beat("gateway", 7), 0.0)
    lease.left(beat("controller", 8, controls=True), Leave.WITHDRAW, 1.0)
    assert lease.standing(1.0) is FENCED
    assert not lease.beat(beat("gateway", 7), 1.5)
    assert lease.standing(1.5) is FENCED
    lease.beat(beat("gateway", 9), 2.0)  # it is on the list again
    assert lease.standing(2.0) is HELD


def test_an_old_controller_takes_nothing_off_the_list() -> None:
    lease = Lease()
    lease.beat(beat("new", 7, controls=True), 0.0)
    lease.left(beat("old", 6, controls=True), Leave.REVOKE, 1.0)
    assert lease.standing(1.0) is HELD


def test_who_is_replaced_never_serves_again() -> None:
    lease = Lease()
    lease.beat(beat("a"), 0.0)
    lease.left(beat("a"), Leave.REVOKE, 1.0)
    assert not lease.beat(beat("b", 9), 2.0)
    assert lease.standing(2.0) is FENCED
    assert lease.ends_at() is None


def test_granters_that_come_and_go_leave_nothing() -> None:
    lease = Lease()
    for n in range(1000):
        lease.beat(beat(f"gateway-{n}"), 4.0 * n)
    assert len(repr(lease)) < 200


@pytest.mark.parametrize(("busy", "expected"), [(True, False), (False, True)])
def test_a_model_that_does_not_move_is_stuck_if_it_has_work(busy: bool, expected: bool) -> None:
    progress = Progress(stall_s=5.0)
    assert progress.seen(3, busy=busy, now=0.0)
    assert progress.seen(3, busy=busy, now=5.0)
    assert progress.seen(3, busy=busy, now=5.1) is expected
    assert progress.seen(4, busy=busy, now=6.0)


def test_time_without_work_does_not_count() -> None:
    progress = Progress(stall_s=5.0)
    progress.seen(3, busy=True, now=0.0)
    progress.seen(3, busy=False, now=100.0)
    assert progress.seen(3, busy=True, now=101.0)


words = st.lists(st.tuples(st.floats(0.01, 5.0), st.integers(0, 2)), min_size=1, max_size=30)


@given(words)
def test_it_is_held_exactly_while_some_grant_runs(said: list[tuple[float, int]]) -> None:
    lease, now, last = Lease(), 0.0, 0.0
    for seconds, granter in said:
        now += seconds
        if last:
            assert lease.standing(now) is (HELD if now < last + 3.0 else FENCED)
        lease.beat(beat(f"g{granter}"), now)
        last = now
        assert lease.standing(now) is HELD
