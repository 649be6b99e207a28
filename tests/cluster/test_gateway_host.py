"""A gateway whose membership nobody follows any more does not go on as if nothing were."""

import asyncio
from pathlib import Path

import pytest

from baton.cluster import gateway_host
from baton.cluster.gateway_host import GatewayHost
from baton.cluster.status import GatewayPlan
from baton.core.config import GatewayConfig
from baton.core.served_model import FrontModel


async def test_a_bug_in_what_follows_the_membership_ends_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def follow(*_: object) -> None:
        raise ValueError("a bug")

    async def serve_once() -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(gateway_host, "follow", follow)
    plan = GatewayPlan("gateway-0", {FrontModel(name="m"): Path("none")}, GatewayConfig())
    host = GatewayHost(plan, lambda: None)
    monkeypatch.setattr(host, "_serve_once", serve_once)
    async with asyncio.timeout(20):
        with pytest.raises(ExceptionGroup) as caught:
            await host.serve()
    assert caught.group_contains(ValueError, match="a bug")
