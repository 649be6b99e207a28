"""How events change what is known of instances."""

from baton.cluster.fleet import (
    Drain,
    Fleet,
    Flip,
    Phase,
    Start,
    acted,
    became_ready,
    gone,
    membership_of,
    was_drained,
    was_lost,
)
from baton.core.ids import InstanceId
from tests.cluster.worlds import BACKOFF, D, P, World, info

NAME = InstanceId("decode-0")
ONE = D.instance(NAME)


def starting(generation: int = 0, fleet: Fleet | None = None) -> Fleet:
    return acted(fleet or {}, Start(ONE, generation, "wanted"), 0.0)


def ready(generation: int = 0) -> Fleet:
    return became_ready(starting(generation), NAME, generation, info(ONE, 7), 1.0)


def test_members_are_the_instances_that_are_ready() -> None:
    assert membership_of(starting(), 2).instances == ()
    membership = membership_of(ready(), 3)
    assert (membership.version, membership.instances) == (3, (info(ONE, 7),))
    assert membership_of(was_lost(ready(), NAME, 0, 2.0, BACKOFF), 4).instances == ()


def test_one_that_drains_is_a_member_until_it_is_empty_or_lost() -> None:
    draining = acted(ready(), Drain(NAME, 0, "wanted"), 2.0)
    assert membership_of(draining, 5).instances == (info(ONE, 7),)
    empty = was_drained(draining, NAME, 0)
    assert membership_of(empty, 6).instances == ()
    assert was_lost(draining, NAME, 0, 3.0, BACKOFF) == empty
    assert was_drained(ready(), NAME, 0) == ready()
    assert was_drained(draining, NAME, 1) == draining


def test_late_news_of_an_older_generation_changes_nothing() -> None:
    fleet = starting(1)
    assert became_ready(fleet, NAME, 0, info(ONE), 2.0) == fleet
    assert was_lost(fleet, NAME, 0, 2.0, BACKOFF) == fleet
    assert acted(fleet, Drain(NAME, 0, "wanted"), 2.0) == fleet
    draining = acted(fleet, Drain(NAME, 1, "wanted"), 2.0)
    assert gone(draining, NAME, 0, 3.0) == draining
    assert was_lost(fleet, InstanceId("decode-1"), 0, 2.0, BACKOFF) == fleet


def test_events_that_do_not_fit_the_phase_change_nothing() -> None:
    assert became_ready(ready(), NAME, 0, info(ONE, 8), 2.0) == ready()
    assert gone(ready(), NAME, 0, 2.0) == ready()
    lost = was_lost(ready(), NAME, 0, 2.0, BACKOFF)
    assert was_lost(lost, NAME, 0, 3.0, BACKOFF) == lost


def test_one_that_drains_is_neither_lost_nor_drained_again() -> None:
    draining = acted(ready(), Drain(NAME, 0, "wanted"), 2.0)
    assert was_lost(draining, NAME, 0, 3.0, BACKOFF)[NAME].phase is Phase.DRAINING
    assert acted(draining, Drain(NAME, 0, "again"), 3.0) == draining
    assert gone(draining, NAME, 0, 4.0) == {}


def test_after_a_flip_another_has_its_place() -> None:
    other = P.instance(InstanceId("prefill-3"))
    fleet = gone(acted(ready(), Flip(NAME, 0, other, "told"), 2.0), NAME, 0, 3.0)
    assert list(fleet) == ["prefill-3"]
    seen = fleet[InstanceId("prefill-3")]
    assert (seen.phase, seen.generation, seen.desired) == (Phase.PLACED, -1, other)


def test_a_long_time_in_service_ends_a_row_of_losses() -> None:
    world = World(D)
    for _ in range(4):
        world.step()
        world.lose("decode-0")
        world.now += 20.0
    world.step()
    world.ready("decode-0")
    seen = world.fleet[NAME]
    short = was_lost(world.fleet, NAME, seen.generation, world.now + 99.0, BACKOFF)
    assert short[NAME].failures == 5
    long = was_lost(world.fleet, NAME, seen.generation, world.now + 100.0, BACKOFF)
    assert long[NAME].failures == 1


def test_losses_in_a_row_rest_longer_and_longer_up_to_the_cap() -> None:
    pauses = [BACKOFF.pause_s(failures) for failures in range(7)]
    assert pauses == [0.0, 0.0, 1.0, 2.0, 4.0, 8.0, 8.0]
    assert BACKOFF.pause_s(10_000) == 8.0
