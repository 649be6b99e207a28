"""What the control plane remembers, and what may be asked of it."""

import json
from pathlib import Path

import pytest

from baton.cluster.fleet import Drain, Flip, Phase, Start, acted, became_ready
from baton.cluster.state import (
    ControlState,
    GatewayHandle,
    Handles,
    begun,
    scaled,
    told_to_flip,
    told_to_leave,
    with_spec,
)
from baton.core.cluster_spec import ClusterSpec
from baton.core.config import ClusterTlsConfig
from baton.core.errors import InvalidConfig, InvalidRequest
from baton.core.ids import InstanceId
from tests.cluster.worlds import World, info


def spec(**pools: object) -> ClusterSpec:
    found = pools or {"prefill": {"instances": 2}, "decode": {"instances": 2}}
    model = {"name": "m", "dir": Path("m"), "pools": found}
    return ClusterSpec.checked(models=[model])


def running(wanted: ClusterSpec) -> ControlState:
    """Return a state in which everything is ready."""
    state = ControlState.of(wanted.with_secrets())
    world = World(*state.wishes())
    world.settle()
    handles = {name: Handles(f"{name}.1", f"{name}.1", 1) for name in world.fleet}
    gateways = {"gateway-0": GatewayHandle("gateway-0.5", "a")}
    return ControlState(state.spec, state.counts, {}, world.fleet, handles, gateways, 4, 1000)


def test_a_state_survives_being_written_down() -> None:
    state = running(spec())
    read = ControlState.from_json(state.to_json(), now=world_time(state))
    assert read == state


def world_time(state: ControlState) -> float:
    return next(iter(state.fleet.values())).since


def test_every_phase_survives_being_written_down() -> None:
    state = running(spec())
    name, now = InstanceId("decode-0"), world_time(state)
    seen = state.fleet[name]
    becomes = state.wishes()[0].instance(InstanceId("prefill-2"))
    fleet = acted(state.fleet, Flip(name, seen.generation, becomes, "told"), now)
    assert fleet[name].phase is Phase.DRAINING
    changed = ControlState(state.spec, state.counts, {name: "prefill"}, fleet, state.handles)
    assert ControlState.from_json(changed.to_json(), now) == changed


def test_a_state_that_cannot_be_read_is_refused_without_showing_it() -> None:
    values = json.loads(running(spec()).to_json())
    broken = [{**values, "spec": {"models": []}}, {**values, "fleet": {"decode-0": {}}}, {}, []]
    for other, found in [({**values, "format": 2}, "2"), *((v, "broken") for v in broken)]:
        with pytest.raises(InvalidConfig, match=f"state: '?{found}.*the Baton that wrote it") as e:
            ControlState.from_json(json.dumps(other), 0.0)
        assert len(str(e.value)) < 200
    with pytest.raises(InvalidConfig, match="broken"):
        ControlState.from_json("{", 0.0)


def test_a_pool_is_scaled_within_its_bounds() -> None:
    state = running(spec())
    assert scaled(state, "decode", 3).counts == {"prefill": 2, "decode": 3}
    assert scaled(state, "prefill", 0).counts == {"prefill": 0, "decode": 2}
    for pool, count, words in [
        ("decode", 1025, "instances: 1025 is not allowed; allowed: 0 to 1024"),
        ("prefill", -1, "instances: -1 is not allowed"),
        ("decode", 0, "1 or more in decode: nobody else decodes"),
        ("mixed", 1, "pool: 'mixed' is not allowed; allowed: one of prefill, decode"),
    ]:
        with pytest.raises(InvalidRequest, match=words):
            scaled(state, pool, count)


def test_a_pool_that_follows_its_load_has_bounds_and_may_be_empty() -> None:
    state = running(spec(decode={"instances": 2, "autoscale": {"min": 0, "max": 3}}))
    assert scaled(state, "decode", 0).counts == {"decode": 0}
    with pytest.raises(InvalidRequest, match="allowed: 0 to 3 in decode"):
        scaled(state, "decode", 4)


def test_another_spec_keeps_the_size_that_a_load_made_within_its_bounds() -> None:
    def auto(**bounds: int) -> ClusterSpec:
        return spec(decode={"autoscale": bounds})

    state = scaled(running(auto(max=8)), "decode", 5)
    assert state.spec.pools()["decode"][1].instances == 1
    revision = state.wishes()[0].revision
    for other, count in [
        (auto(max=8), 5),
        (auto(max=4), 4),
        (auto(min=6, max=8), 6),
        (spec(decode={}), 1),
    ]:
        changed = with_spec(state, other)
        assert changed.counts == {"decode": count}
        assert changed.wishes()[0].revision == revision, "nothing is to be rolled out"


def test_one_that_is_told_to_leave_makes_its_pool_smaller() -> None:
    state = told_to_leave(running(spec()), "decode-0")
    assert state.counts == {"prefill": 2, "decode": 1}
    assert state.leaving == {"decode-0": ""}
    with pytest.raises(InvalidRequest, match="one of decode-1, prefill-0, prefill-1"):
        told_to_leave(state, "decode-0")
    with pytest.raises(InvalidRequest, match="nobody else decodes"):
        told_to_leave(state, "decode-1")
    empty = ControlState.of(spec())
    with pytest.raises(InvalidRequest, match="no instance is there"):
        told_to_leave(empty, "decode-0")


def test_one_that_is_told_to_flip_changes_both_pools() -> None:
    most = {"instances": 2, "autoscale": {"max": 3}}
    state = told_to_flip(running(spec(prefill={"instances": 2}, decode=most)), "prefill-1")
    assert state.counts == {"prefill": 1, "decode": 3}
    assert state.leaving == {"prefill-1": "decode"}
    with pytest.raises(InvalidRequest, match="1 to 3 in decode"):
        told_to_flip(state, "prefill-0")
    back = told_to_flip(running(spec()), "decode-1")
    assert back.counts == {"prefill": 3, "decode": 1}


def test_what_does_not_fit_the_same_place_cannot_flip() -> None:
    unlike = spec(prefill={"parallel": {"tp": 2}}, decode={"instances": 2})
    with pytest.raises(InvalidRequest, match="as many ranks and the same resources"):
        told_to_flip(running(unlike), "decode-0")
    with pytest.raises(InvalidRequest, match="prefills or decodes"):
        told_to_flip(running(spec(mixed={"instances": 2})), "mixed-0")


def test_another_spec_keeps_secrets_and_forgets_what_was_scaled() -> None:
    state = scaled(running(spec()), "decode", 3)
    same = with_spec(state, spec())
    assert same.spec == state.spec
    assert same.counts == {"prefill": 2, "decode": 2}
    assert same.wishes()[1].revision == state.wishes()[1].revision
    fresh = with_spec(state, spec(mixed={}))
    assert fresh.counts == {"mixed": 1}


def test_tls_is_not_turned_on_between_processes_that_run() -> None:
    state = running(spec())
    secured = spec().model_copy(
        update={"tls": ClusterTlsConfig(cert=Path("c"), key=Path("k"), ca=Path("a"))}
    )
    with pytest.raises(InvalidConfig, match=r"tls: .*none, as what runs has, until `baton down`"):
        with_spec(state, secured)
    with pytest.raises(InvalidConfig, match="some, as what runs has"):
        with_spec(running(secured), spec())
    assert with_spec(running(secured), secured).spec.tls == secured.tls


def test_a_late_report_of_readiness_is_remembered() -> None:
    state = running(spec())
    seen = state.fleet[InstanceId("decode-0")]
    again = became_ready(state.fleet, InstanceId("decode-0"), 0, info(seen.desired), 0.0)
    assert again == state.fleet


def test_each_start_has_names_that_were_never_used_and_keeps_its_place() -> None:
    state = running(spec())
    name = InstanceId("decode-0")
    want = state.fleet[name].desired
    again = begun(state, (Start(want, 1, "lost"),), 5.0)
    assert again.handles[name] == Handles("decode-0.1", "decode-0.5", 1)
    new = state.wishes()[1].instance(InstanceId("decode-2"))
    more = begun(again, (Start(new, 0, "wanted"), Drain(name, 1, "told")), 6.0)
    assert more.handles[InstanceId("decode-2")] == Handles("decode-2.6", "decode-2.6", 1)
    assert more.fleet[name].phase is Phase.DRAINING
    assert more.serial == 6
