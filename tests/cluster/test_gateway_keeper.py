"""Which gateways a spec wants, and how they are let go."""

from dataclasses import replace
from pathlib import Path

import pytest

from baton.cluster import ray_calls
from baton.cluster.control import Control
from baton.cluster.gateway_keeper import GatewayKeeper, gateway_plans, revision_of
from baton.cluster.state import ControlState, GatewayHandle
from baton.cluster.status import GatewayInfo, ModelLoad
from baton.cluster.surroundings import Surroundings
from baton.core.cluster_spec import ClusterSpec
from baton.core.errors import DeadlineExceeded, InstanceLost, InvalidConfig, Unavailable


def spec(**gateways: int | str) -> ClusterSpec:
    pools = {"prefill": {}, "decode": {}}
    one = {"name": "one", "dir": Path("m"), "pools": pools, "gateways": gateways}
    two = {"name": "two", "dir": Path("m"), "pools": {"mixed": {}}, "gateways": {}}
    return ClusterSpec.checked(models=[one, two])


def test_each_model_may_have_its_own_with_ports_of_their_own() -> None:
    plans = gateway_plans(spec(count=2, http_port=80, grpc_port=81))
    seen = {
        name: (model.name, plan.config.http_port, model.expects_prefill)
        for name, plan in plans.items()
        for model in plan.models
    }
    assert seen == {
        "gateway-0": ("one", 80, True),
        "gateway-1": ("one", 82, True),
        "gateway-2": ("two", 8000, False),
    }


def test_gateways_with_nodes_of_their_own_have_the_same_ports() -> None:
    plans = gateway_plans(spec(count=2, http_port=80, node_resource="gateway-one"))
    seen = [(plan.config.http_port, plan.node_resource) for plan in plans.values()]
    assert seen == [(80, "gateway-one"), (80, "gateway-one"), (8000, "")]


def test_a_gateway_knows_which_pools_may_be_empty() -> None:
    def plan(**autoscale: int) -> tuple[bool, bool]:
        pools = {role: {"autoscale": {"max": 2, **autoscale}} for role in ("prefill", "decode")}
        model = {"name": "one", "dir": Path("m"), "pools": pools}
        (found,) = gateway_plans(ClusterSpec.checked(models=[model]))["gateway-0"].models
        return found.expects_prefill, found.may_be_empty

    assert plan(min=1) == (True, False)
    assert plan(min=0) == (False, True)


def test_a_change_of_what_it_is_started_with_is_another_revision() -> None:
    first = gateway_plans(spec(count=1))["gateway-0"]
    assert revision_of(first) == revision_of(gateway_plans(spec(count=2))["gateway-0"])
    other = gateway_plans(spec(count=1, max_open_requests=7))["gateway-0"]
    assert revision_of(first) != revision_of(other)


@pytest.mark.parametrize(
    ("found", "ended", "kept"),
    [
        (InstanceLost("there is no actor"), None, False),
        (Unavailable("Ray does not answer"), None, True),
        (None, Unavailable("Ray does not answer"), True),
        (None, None, False),
    ],
    ids=["it has ended", "nobody knows", "it may run on", "closed"],
)
async def test_a_gateway_is_forgotten_once_it_has_ended_and_not_before(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    found: Exception | None,
    ended: Exception | None,
    kept: bool,
) -> None:
    async def find_actor(*_: object) -> str:
        if found:
            raise found
        return "actor"

    async def call(*_: object, **__: object) -> None:
        raise DeadlineExceeded("it hangs")

    async def end(actor: object) -> None:
        if ended:
            raise ended

    for function in (find_actor, call, end):
        monkeypatch.setattr(ray_calls, function.__name__, function)
    state = ControlState.of(spec(count=1))
    state = replace(state, gateways={"gateway-0": GatewayHandle("gateway-0.1", "r")})
    control = Control(state, Surroundings(log_dir=tmp_path))
    keeper = GatewayKeeper(control, tmp_path)
    if kept:
        with pytest.raises(Unavailable):
            await keeper.close_all()
    else:
        await keeper.close_all()
    assert bool(control.state.gateways) is kept


async def test_a_gateway_that_hangs_is_started_again_and_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    silence = DeadlineExceeded("it hangs")
    busy = InvalidConfig("http_port", 80, "a port that is free")
    answers: list[int | Exception] = [silence] * 9  # it may still be starting
    answers += [7, silence, busy, *[silence] * 4, 7]  # not so often
    answers += [silence] * 6 + [InstanceLost("its process ended")] + [silence] * 9 + [8, 9]
    started: list[str] = []

    async def find_actor(name: str, timeout_s: float) -> str:
        return name

    async def call(*_: object, **__: object) -> GatewayInfo:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return GatewayInfo("gateway-0", "http://g", "g", answer, 0, {"one": ModelLoad(0)})

    async def start_again(actor: str) -> None:
        started.append(actor)
        raise Unavailable("Ray did not answer")

    for function in (find_actor, call, start_again):
        monkeypatch.setattr(ray_calls, function.__name__, function)
    state = ControlState.of(spec(count=1))
    state = replace(state, gateways={"gateway-0": GatewayHandle("gateway-0.1", "r")})
    control = Control(state, Surroundings(log_dir=tmp_path))
    keeper = GatewayKeeper(control, tmp_path)
    while answers:
        await keeper.look()
    assert started == ["gateway-0.1"]
    assert [(event.what, event.reason) for event in control.journal.after(0)] == [
        ("lost", "pid 7 has not answered 6 times, and is ended"),
        ("trouble", "not ended: Ray did not answer"),
        ("ready", "pid 8 at http://g"),
        ("lost", "pid 8 has ended"),
        ("ready", "pid 9 at http://g"),
    ]
