"""The planner: every decision, without Ray."""

from hypothesis import given
from hypothesis import strategies as st

from baton.cluster.reconcile import (
    Backoff,
    Desired,
    Fleet,
    Phase,
    Start,
    became_ready,
    begun,
    membership_of,
    missing,
    reconcile,
    was_lost,
)
from baton.core.ids import Incarnation, InstanceId
from baton.core.topology import InstanceInfo, Role

P = Desired(InstanceId("prefill-0"), Role.PREFILL)
D = Desired(InstanceId("decode-0"), Role.DECODE)
WANTED = (P, D)
BACKOFF = Backoff(first_s=1.0, cap_s=8.0, forgive_s=100.0)


def info(want: Desired, incarnation: int = 1) -> InstanceInfo:
    return InstanceInfo(
        instance_id=want.instance_id,
        role=want.role,
        address="127.0.0.1:1",
        incarnation=Incarnation(incarnation),
        pid=1,
        model="m",
        compatibility="c",
        max_model_len=1,
        kv_tokens=1,
        max_sequences=1,
        load_s=0.0,
    )


def lose(fleet: Fleet, want: Desired, now: float) -> Fleet:
    start = Start(want, fleet[want.instance_id].generation)
    return was_lost(fleet, start, now, BACKOFF)


def test_everything_is_started_once() -> None:
    plan = reconcile(WANTED, {}, 0.0, BACKOFF)
    assert plan.starts == (Start(P, 0), Start(D, 0))
    fleet: Fleet = {}
    for start in plan.starts:
        fleet = begun(fleet, start, 0.0)
    again = reconcile(WANTED, fleet, 1.0, BACKOFF)
    assert (again.starts, again.ask_again_at) == ((), None)


def test_only_what_is_missing_is_started() -> None:
    fleet = begun({}, Start(P, 0), 0.0)
    assert reconcile(WANTED, fleet, 0.0, BACKOFF).starts == (Start(D, 0),)


def test_the_first_loss_is_made_good_at_once_under_a_new_generation() -> None:
    fleet = became_ready(begun({}, Start(D, 0), 0.0), Start(D, 0), info(D), 1.0)
    fleet = lose(fleet, D, 2.0)
    assert reconcile((D,), fleet, 2.0, BACKOFF).starts == (Start(D, 1),)


def test_losses_in_a_row_wait_longer_and_longer_up_to_the_cap() -> None:
    fleet: Fleet = {}
    pauses = []
    for generation in range(7):
        fleet = begun(fleet, Start(D, generation), 0.0)
        fleet = lose(fleet, D, 10.0)
        plan = reconcile((D,), fleet, 10.0, BACKOFF)
        pauses.append(0.0 if plan.starts else (plan.ask_again_at or 0.0) - 10.0)
    assert pauses == [0.0, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0]


def test_it_is_started_when_the_pause_is_over_and_not_before() -> None:
    fleet = lose(begun({}, Start(D, 0), 0.0), D, 0.0)
    fleet = lose(begun(fleet, Start(D, 1), 0.0), D, 5.0)
    assert reconcile((D,), fleet, 5.99, BACKOFF).starts == ()
    assert reconcile((D,), fleet, 5.99, BACKOFF).ask_again_at == 6.0
    assert reconcile((D,), fleet, 6.0, BACKOFF).starts == (Start(D, 2),)


def test_a_long_time_in_service_ends_a_row_of_losses() -> None:
    fleet: Fleet = {}
    for generation in range(4):
        fleet = lose(begun(fleet, Start(D, generation), 0.0), D, 0.0)
    fleet = begun(fleet, Start(D, 4), 10.0)
    fleet = became_ready(fleet, Start(D, 4), info(D), 10.0)
    short = lose(fleet, D, 109.0)
    assert short[D.instance_id].failures == 5
    long = lose(fleet, D, 110.0)
    assert long[D.instance_id].failures == 1


def test_late_news_of_an_older_generation_changes_nothing() -> None:
    fleet = lose(begun({}, Start(D, 0), 0.0), D, 1.0)
    fleet = begun(fleet, Start(D, 1), 1.0)
    assert became_ready(fleet, Start(D, 0), info(D), 2.0) == fleet
    assert was_lost(fleet, Start(D, 0), 2.0, BACKOFF) == fleet


def test_a_loss_is_counted_once() -> None:
    fleet = lose(begun({}, Start(D, 0), 0.0), D, 1.0)
    assert was_lost(fleet, Start(D, 0), 2.0, BACKOFF) == fleet


def test_members_are_the_instances_that_are_ready() -> None:
    fleet: Fleet = begun(begun({}, Start(P, 0), 0.0), Start(D, 0), 0.0)
    assert missing(WANTED, fleet) == (P.instance_id, D.instance_id)
    fleet = became_ready(fleet, Start(D, 0), info(D, 7), 1.0)
    assert membership_of(fleet, 3).instances == (info(D, 7),)
    assert membership_of(fleet, 3).version == 3
    assert missing(WANTED, fleet) == (P.instance_id,)
    assert membership_of(lose(fleet, D, 2.0), 4).instances == ()


@given(st.lists(st.tuples(st.sampled_from(["ready", "lose", "wait"]), st.booleans()), max_size=40))
def test_whatever_happens_each_instance_runs_once_or_is_to_be_started(
    story: list[tuple[str, bool]],
) -> None:
    fleet: Fleet = {}
    now = 0.0
    for event, first in story:
        plan = reconcile(WANTED, fleet, now, BACKOFF)
        for start in plan.starts:
            fleet = begun(fleet, start, now)
        want = WANTED[first]
        start = Start(want, fleet[want.instance_id].generation)
        now += 0.5
        if event == "ready":
            fleet = became_ready(fleet, start, info(want), now)
        elif event == "lose":
            fleet = was_lost(fleet, start, now, BACKOFF)
        for seen in fleet.values():
            assert (seen.info is not None) == (seen.phase is Phase.READY)
        plan = reconcile(WANTED, fleet, now, BACKOFF)
        lost = {n for n, seen in fleet.items() if seen.phase is Phase.LOST}
        started = {s.desired.instance_id for s in plan.starts}
        assert started <= lost
        assert lost == started or plan.ask_again_at is not None
