"""Pools that follow the load that their instances report, over a real Ray with stand-in workers."""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from baton.cluster import ray_calls, ray_environment
from baton.cluster.ray_head import RayHead
from baton.cluster.status import Status
from baton.core.errors import InvalidRequest
from tests.cluster.controllers import PATIENCE_S, Cluster, spec
from tests.cluster.stand_in_worker import LOAD_FILE

DEMO_MODEL = Path(__file__).parents[2] / "demo_model/main"


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch, short_temp_dir: Path) -> Callable[[], Any]:
    """Return a context: a Ray of our own with room for three, and a controller with no spec yet."""
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv(LOAD_FILE, str(short_temp_dir / "load.json"))
    load(short_temp_dir)

    @asynccontextmanager
    async def running() -> AsyncIterator[Cluster]:
        head = await RayHead.start(
            short_temp_dir, slots=3, environment=ray_environment.head_environment(1), timeout_s=120
        )
        try:
            await ray_calls.connect(head.address, 60)
            try:
                found = Cluster(short_temp_dir / "logs", "stand_in_worker:Loaded")
                await found.start()
                yield found
            finally:
                await ray_calls.disconnect(60)
        finally:
            await head.stop(grace_s=20)

    return running


def load(folder: Path, **by_role: dict[str, float]) -> None:
    """Let all stand-ins of each role report this from now on."""
    written = folder / "load.new"
    written.write_text(json.dumps(by_role))
    written.rename(folder / "load.json")


@pytest.mark.timeout(400)
async def test_pools_follow_their_load_and_the_journal_says_why(
    cluster: Callable[[], Any], short_temp_dir: Path
) -> None:
    at_once, never = {"grow_after_s": 0, "shrink_after_s": 0}, 1e6
    pools = {
        "prefill": {"autoscale": {"max": 3, **at_once}},
        "decode": {"autoscale": {"min": 0, "max": 2, **at_once, "shrink_after_s": never}},
    }
    gateways = {"count": 1, "http_port": 0, "grpc_port": 0}
    wanted = spec(pools=pools, gateways=gateways, dir=DEMO_MODEL)
    async with cluster() as control:

        async def decided(whom: str, reason: str, what: str = "autoscale") -> None:
            await control.event(
                lambda e: (e.whom, e.what) == (whom, what) and e.reason.startswith(reason)
            )

        await control.ask("apply", wanted)
        assert sorted(await control.instances()) == ["decode-0", "prefill-0"]
        with pytest.raises(InvalidRequest, match="0 to 2 in decode"):
            await control.ask("scale", "decode", 3)

        load(short_temp_dir, decode={"waited_s": 2.5, "waiting": 1, "open_requests": 1})
        await decided("decode", "1 to 2: queue_s is 2.50 of what is wanted")
        assert sorted(await control.instances()) == ["decode-0", "decode-1", "prefill-0"]

        # There is no room for another prefill instance, and decode could do with one fewer.
        load(short_temp_dir, prefill={"blocks_used": 99, "open_requests": 1})
        await decided("decode-1", "prefill takes its place: kv_use is 1.16 of what is wanted")
        await control.until("prefill-1", "ready")

        # Now it could not: Ray is asked for a node, if somebody can bring one.
        await decided("prefill", "3 would be right", "trouble")

        load(short_temp_dir)
        await decided("prefill", "2 to 1: kv_use is 0.00 of what is wanted")
        await control.until("prefill-1", "gone")
        assert sorted(await control.instances()) == ["decode-0", "prefill-0"]

        # A request that comes when nobody decodes waits, and brings somebody.
        await control.ask("scale", "decode", 0)
        await control.until("decode-0", "gone")
        request = asyncio.create_task(asked(await url(control)))
        await decided("decode", "0 to 1: requests wait for an instance: 1")
        request.cancel()
        await control.ask("down")


async def url(control: Cluster) -> str:
    """Return where the gateway listens, once it does."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            status: Status = await control.ask("status")
            info = status.gateways[0].info
            if info is not None:
                return info.http_url


async def asked(url: str) -> None:
    """Send a request, and wait for as long as it takes."""
    body = {"model": "none", "prompt": "def"}
    async with httpx.AsyncClient(timeout=PATIENCE_S, trust_env=False) as client:
        await client.post(f"{url}/v1/completions", json=body)
