"""The questions of gateways to each other, with a Ray that is played by a dictionary."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from baton.api.peers import Ended
from baton.cluster import ray_calls
from baton.cluster.gateway_host import GatewayHost
from baton.cluster.gateway_peers import GatewayPeers
from baton.cluster.status import GatewayPlan
from baton.core.config import GatewayConfig
from baton.core.errors import BatonError, DeadlineExceeded, InstanceLost, Overloaded, Unavailable
from baton.core.served_model import FrontModel
from baton.core.tenants import ANYBODY

ASKED = ("cmpl-gateway-1.2-x", ANYBODY)


class Door:
    """A gateway that has one request."""

    def __init__(self) -> None:
        self.gateway = self

    def cancel(self, *asked: Any) -> Ended:
        assert asked == ASKED
        return Ended(3, 1)

    def explain(self, *asked: Any) -> dict[str, Any]:
        assert asked == ASKED
        return {"request_id": asked[0]}

    def trace(self, *asked: Any) -> None:
        assert asked == ASKED


@pytest.fixture
def actors(monkeypatch: pytest.MonkeyPatch) -> dict[str, GatewayHost | BatonError]:
    """What Ray finds by name, and what comes of calling it."""
    actors: dict[str, GatewayHost | BatonError] = {}

    async def find(name: str, timeout_s: float) -> Any:
        if name not in actors:
            raise InstanceLost(f"there is no actor {name}")
        return actors[name]

    async def call(actor: Any, method: str, *arguments: Any, timeout_s: float) -> Any:
        if isinstance(actor, BatonError):
            raise actor
        return await getattr(actor, method)(*arguments)

    monkeypatch.setattr(ray_calls, "find_actor", find)
    monkeypatch.setattr(ray_calls, "call", call)
    plan = GatewayPlan("gateway-1", {FrontModel(name="m"): Path("none")}, GatewayConfig())
    host = actors["gateway-1.2"] = GatewayHost(plan, lambda: None)
    host.door = Door()  # type: ignore[assignment]
    return actors


async def test_the_gateway_that_has_it_answers(actors: dict[str, Any]) -> None:
    peers = GatewayPeers("gateway-0.1")
    assert await peers.cancel("gateway-1.2", *ASKED) == Ended(3, 1)
    assert await peers.explain("gateway-1.2", *ASKED) == {"request_id": ASKED[0]}
    assert await peers.trace("gateway-1.2", *ASKED) is None


async def test_one_that_is_gone_has_nothing(actors: dict[str, Any]) -> None:
    peers = GatewayPeers("gateway-0.1")
    actors["gateway-3.4"] = InstanceLost("its process ended")
    actors["gateway-1.2"].door = None  # it listens no more, or not yet
    for gone in ("gateway-1.2", "gateway-3.4", "gateway-5.6"):
        assert await peers.cancel(gone, *ASKED) == Ended(0, 0)
        assert await peers.explain(gone, *ASKED) is None


@pytest.mark.parametrize("error", [DeadlineExceeded("late"), Unavailable("no Ray")])
async def test_one_that_does_not_answer_is_told_of(actors: dict[str, Any], error: Any) -> None:
    actors["gateway-3.4"] = error
    with pytest.raises(Unavailable, match=r"gateway-3\.4, which has the request, cannot be asked"):
        await GatewayPeers("gateway-0.1").cancel("gateway-3.4", *ASKED)


async def test_an_id_reaches_gateways_and_no_other_actor(actors: dict[str, Any]) -> None:
    actors["controller"] = actors["prefill-0.1"] = Unavailable("asked all the same")
    peers = GatewayPeers("gateway-0.1")
    for name in ("controller", "prefill-0.1", "gateway-", "gateway-0.1\n"):
        assert await peers.explain(name, *ASKED) is None


async def test_not_too_many_ask_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = asyncio.Event()

    async def find(name: str, timeout_s: float) -> Any:
        await go_on.wait()
        raise InstanceLost(f"there is no actor {name}")

    monkeypatch.setattr(ray_calls, "find_actor", find)
    peers = GatewayPeers("gateway-0.1")
    async with asyncio.TaskGroup() as group:
        asking = [group.create_task(peers.explain("gateway-1.2", *ASKED)) for _ in range(4)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="too many ask"):
            await peers.explain("gateway-1.2", *ASKED)
        go_on.set()
    assert [task.result() for task in asking] == [None] * 4
