"""The planner: every decision, without Ray."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.cluster.fleet import Drain, Flip, Phase, Start, Stop
from baton.cluster.plan import missing
from baton.core.ids import InstanceId
from tests.cluster.worlds import D, Machines, P, World


def settled(*wishes: object, places: int = 100) -> World:
    world = World(*(wishes or (P, D)), places=places)  # type: ignore[arg-type]
    world.settle()
    return world


def test_everything_is_started_once() -> None:
    world = World(P, D)
    assert [(a.instance_id, a.generation) for a in world.step()] == [
        ("prefill-0", 0),
        ("decode-0", 0),
        ("decode-1", 0),
    ]
    assert world.step() == ()
    assert world.plan().ask_again_at is None


def test_one_that_is_lost_is_started_again_under_a_new_generation() -> None:
    world = settled()
    world.lose("decode-1")
    (start,) = world.step()
    assert isinstance(start, Start)
    assert (start.instance_id, start.generation) == ("decode-1", 1)
    assert start.reason == "it was lost, 1 in a row"


def test_it_is_started_when_its_rest_is_over_and_not_before() -> None:
    world = settled()
    world.lose("decode-1")
    world.step()
    world.lose("decode-1")
    lost_at = world.now
    world.now += 0.99
    assert world.step() == ()
    assert world.plan().ask_again_at == lost_at + 1.0
    world.now = lost_at + 1.0
    assert [a.generation for a in world.step()] == [2]


def test_scaling_up_starts_what_is_missing() -> None:
    world = settled()
    world.want("decode", count=4)
    assert [a.instance_id for a in world.step()] == ["decode-2", "decode-3"]


def test_scaling_down_drains_those_that_came_last() -> None:
    world = settled()
    world.want("decode", count=1)
    (drain,) = world.step()
    assert isinstance(drain, Drain)
    assert (drain.instance_id, drain.reason) == ("decode-1", "1 wanted in decode")
    assert world.step() == ()
    world.gone("decode-1")
    assert world.names() == ["decode-0", "prefill-0"]


def test_scaling_down_ends_those_that_serve_nobody_first() -> None:
    world = settled()
    world.lose("decode-0")
    world.want("decode", count=1)
    (stop,) = world.step()
    assert isinstance(stop, Stop)
    assert stop.instance_id == "decode-0"


def test_a_pool_that_is_wanted_no_more_goes() -> None:
    world = settled()
    world.wishes = (D,)
    (drain,) = world.step()
    assert drain.instance_id == "prefill-0"
    assert "not wanted any more" in drain.reason


def test_a_changed_config_is_rolled_out_new_ones_first() -> None:
    world = settled()
    world.want("decode", revision="b")
    assert [(type(a), a.instance_id) for a in world.step()] == [(Start, "decode-2")]
    assert world.step() == ()
    world.ready("decode-2")
    assert [(type(a), a.instance_id) for a in world.step()] == [(Drain, "decode-0")]
    assert world.step() == ()
    world.gone("decode-0")
    assert [(type(a), a.instance_id) for a in world.step()] == [(Start, "decode-0")]
    world.ready("decode-0")
    assert [(type(a), a.instance_id) for a in world.step()] == [(Drain, "decode-1")]
    world.gone("decode-1")
    assert world.step() == ()
    assert {s.desired.revision for s in world.fleet.values() if s.desired.pool == "decode"} == {"b"}


def test_with_no_room_one_leaves_first() -> None:
    world = settled(places=3)
    world.want("decode", revision="b")
    (drain,) = world.step()
    assert (type(drain), drain.instance_id) == (Drain, "decode-0")
    assert world.step() == (), "its place is not free yet"
    world.gone("decode-0")
    assert [(type(a), a.instance_id) for a in world.step()] == [(Start, "decode-0")]
    assert world.step() == (), "one at a time"
    world.ready("decode-0")
    assert [a.instance_id for a in world.step()] == ["decode-1"]


def test_a_broken_config_stops_the_roll_out() -> None:
    world = settled()
    world.want("decode", revision="broken")
    for _ in range(20):
        world.now += 10.0
        for action in world.step():
            assert isinstance(action, Start), action
            world.lose(action.instance_id)
    assert world.ready_in("decode") == 2


def test_a_config_that_changes_before_it_was_ready_is_replaced_at_once() -> None:
    world = World(D)
    world.step()
    world.want("decode", revision="b")
    assert {type(a) for a in world.step()} == {Stop}


def test_what_is_lost_does_not_keep_its_place_when_its_config_changes() -> None:
    """The place is as large as the old config asked for."""
    world = settled()
    world.lose("decode-1")
    world.want("decode", revision="b")
    actions = {a.instance_id: type(a) for a in world.step()}
    assert actions[InstanceId("decode-1")] is Stop
    world.settle()
    assert missing(world.wishes, world.fleet) == []


def test_a_flip_reserves_its_name_and_goes_to_the_same_place() -> None:
    world = settled()
    world.want("prefill", count=2)
    world.want("decode", count=1)
    world.leaving = {InstanceId("decode-0"): "prefill"}
    (flip,) = world.step()
    assert isinstance(flip, Flip)
    assert (flip.instance_id, flip.becomes.instance_id) == ("decode-0", "prefill-1")
    assert world.step() == ()
    world.gone("decode-0")
    (start,) = world.step()
    assert isinstance(start, Start)
    assert (start.instance_id, start.generation) == ("prefill-1", 0)
    assert start.reason == "its place is free"
    world.ready("prefill-1")
    assert world.names() == ["decode-1", "prefill-0", "prefill-1"]
    assert world.step() == ()


def test_one_that_is_told_to_leave_leaves() -> None:
    world = settled()
    world.want("decode", count=1)
    world.leaving = {InstanceId("decode-0"): "", InstanceId("gone-7"): ""}
    (drain,) = world.step()
    assert (drain.instance_id, drain.reason) == ("decode-0", "it was told to leave")


def test_what_is_missing_is_told_by_pool() -> None:
    world = World(P, D)
    world.step()
    world.ready("decode-1")
    assert missing(world.wishes, world.fleet) == ["prefill 0 of 1", "decode 1 of 2"]
    world.settle()
    assert missing(world.wishes, world.fleet) == []


EVENTS = ["ready", "lose", "gone", "wait", "scale", "change", "flip", "leave"]


@given(
    st.lists(st.tuples(st.sampled_from(EVENTS), st.integers(0, 7)), max_size=40),
    st.integers(3, 12),
)
def test_whatever_happens_it_ends_as_desired(story: list[tuple[str, int]], places: int) -> None:
    world = settled(places=places)
    for event, number in story:
        world.step()
        names = world.names()
        name = names[number % len(names)] if names else ""
        world.now += 0.5
        if event in ("ready", "lose", "gone") and name:
            getattr(world, event)(name)
        elif event == "scale":
            world.want(("prefill", "decode")[number % 2], count=number // 2)
        elif event == "change":
            world.want(("prefill", "decode")[number % 2], revision=str(number // 2))
        elif event in ("flip", "leave") and name:
            world.leaving[InstanceId(name)] = ("prefill", "decode")[number % 2] * (event == "flip")
        for seen in world.fleet.values():
            assert seen.info is not None or seen.phase is not Phase.READY
            assert seen.info is None or seen.phase in (Phase.READY, Phase.DRAINING)
    world.settle()
    assert missing(world.wishes, world.fleet) == []
    for wish in world.wishes:
        pool = [s for s in world.fleet.values() if s.desired.pool == wish.pool]
        assert all(s.desired.revision == wish.revision for s in pool)


@pytest.mark.parametrize(("places", "least"), [(3, 1), (4, 2)])
@given(order=st.lists(st.integers(0, 7), max_size=40))
def test_a_roll_out_keeps_enough_ready(places: int, least: int, order: list[int]) -> None:
    world = settled(places=places)
    world.want("decode", revision="b")
    for number in order:
        world.step()
        name = world.names()[number % len(world.fleet)]
        world.gone(name) if world.fleet[InstanceId(name)].phase is Phase.DRAINING else world.ready(
            name
        )
        assert world.ready_in("decode") >= least
        assert len(world.fleet) <= places
    world.settle()
    assert missing(world.wishes, world.fleet) == []


def rolling(
    nodes: list[int], *, old: list[int], new: list[int], prefill: int = 1, decode: int = 1
) -> Machines:
    """Return a settled world in which both pools are now to have instances that need more."""
    wishes = (replace(P, count=prefill), replace(D, count=decode))
    world = Machines(*wishes, nodes=nodes, needs={"old": old, "new": new})
    world.want("prefill", revision="old")
    world.want("decode", revision="old")
    world.settle()
    world.want("prefill", revision="new")
    world.want("decode", revision="new")
    return world


def test_room_is_for_one_of_those_that_want_it() -> None:
    world = rolling([2, 2], old=[1], new=[2])
    assert world.taken == {"prefill-0": [(0, 1)], "decode-0": [(0, 1)]}
    assert [(type(a), a.instance_id) for a in world.step()] == [(Start, "prefill-1")]
    assert world.step() == ()
    world.ready("prefill-1")
    assert [a.instance_id for a in world.step()] == ["prefill-0", "decode-0"]


def test_one_leaves_first_where_the_room_is_not_in_one_piece() -> None:
    """Another takes the room, and what its old one leaves is a half: that of decode lacks."""
    world = rolling([2, 2], old=[1], new=[2])
    world.wishes = world.wishes[::-1]
    assert [(type(a), a.instance_id) for a in world.step()] == [(Start, "decode-1")]
    world.free[1] = 0
    world.ready("decode-1")
    assert world.fleet[InstanceId("decode-1")].unplaced
    (drain,) = world.step()
    assert (type(drain), drain.instance_id) == (Drain, "decode-0")
    assert drain.reason == "its config has changed, and there is no room for one more"
    assert world.step() == (), "what is leaving makes room"
    world.gone("decode-0")
    assert world.free == [1, 0]
    world.free[1] = 2
    world.settle()
    assert missing(world.wishes, world.fleet) == []


def test_the_last_of_a_pool_waits_until_the_others_of_its_model_serve() -> None:
    world = rolling([1, 1], old=[1], new=[1])
    assert [a.instance_id for a in world.step()] == ["prefill-0"]
    assert world.step() == ()
    world.gone("prefill-0")
    assert [(type(a), a.instance_id) for a in world.step()] == [(Start, "prefill-0")]
    world.lose("prefill-0")
    assert {type(a) for a in world.step()} == {Start}, "a config that does not start stops it here"
    world.ready("prefill-0")
    assert [(type(a), a.instance_id) for a in world.step()] == [(Drain, "decode-0")]


def test_a_pool_of_another_model_is_not_waited_for() -> None:
    other = replace(P, pool="other", model="other")
    world = settled(D, other, places=3)
    world.lose("other-0")
    world.want("decode", count=1)
    world.settle()
    world.lose("other-0")
    world.places = 2
    world.want("decode", revision="b")
    assert Drain in {type(a) for a in world.step()}


@given(
    order=st.lists(st.integers(0, 7), max_size=60),
    prefill=st.integers(1, 2),
    decode=st.integers(1, 2),
    stages=st.integers(1, 2),
    spare=st.integers(0, 2),
)
def test_a_roll_out_to_stages_that_fill_a_node_each_goes_on(
    order: list[int], prefill: int, decode: int, stages: int, spare: int
) -> None:
    nodes = [2] * ((prefill + decode) * stages + spare)
    world = rolling(nodes, old=[1], new=[2] * stages, prefill=prefill, decode=decode)
    for number in order:
        world.step()
        name = world.names()[number % len(world.fleet)]
        draining = world.fleet[InstanceId(name)].phase is Phase.DRAINING
        (world.gone if draining else world.ready)(name)
        ready = {"prefill": world.ready_in("prefill"), "decode": world.ready_in("decode")}
        assert ready["prefill"] >= prefill - 1
        assert ready["decode"] >= decode - 1
        assert any(ready.values())
        world.now += 1.0
    world.settle()
    assert missing(world.wishes, world.fleet) == []
