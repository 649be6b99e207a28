"""Health turns bad when something of a handover waits beyond its budget, and good again after."""

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton.decode_worker.attempt import HandoverAttempt

PROMPT = tuple(range(10, 110))


async def becomes(worker: Any, *, serving: bool) -> None:
    """Wait until the worker's health service says so."""
    status = health_pb2.HealthCheckResponse
    wanted = status.SERVING if serving else status.NOT_SERVING
    async with grpc.aio.insecure_channel(worker.info.address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        async with asyncio.timeout(30):
            while (await watch.read()).status != wanted:
                pass


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Reads end only once this is set."""
    gate, read = asyncio.Event(), HandoverAttempt._read

    async def held(attempt: HandoverAttempt, action: Any) -> None:
        await gate.wait()
        await read(attempt, action)

    monkeypatch.setattr(HandoverAttempt, "_read", held)
    return gate


async def test_reads_that_stall_and_offers_that_nobody_reads(
    start_pair: Any, tools: Any, demo_model_dir: Path, gate: asyncio.Event
) -> None:
    pair = await start_pair(
        demo_model_dir,
        prefill={"handover": {"unread_budget_s": 0.01}},
        decode={"handover": {"stall_budget_s": 0.01}},
    )
    await becomes(pair.decode, serving=True)
    answer = await pair.session.submit(tools.prompt(PROMPT, 4), [pair.ref])
    await becomes(pair.decode, serving=False)
    await becomes(pair.prefill, serving=False)
    assert "handovers have read for over" in pair.decode.problems()[0]
    assert "offered and not read" in pair.prefill.problems()[0]
    gate.set()
    assert (await answer.wait()).reason == "length"
    await becomes(pair.decode, serving=True)
    await becomes(pair.prefill, serving=True)


async def test_blocks_that_wait_for_a_fence(
    start_pair: Any, tools: Any, demo_model_dir: Path, gate: asyncio.Event
) -> None:
    pair = await start_pair(demo_model_dir, decode={"handover": {"fencing_budget": 0.001}})
    key, answer = await pair.session.submit_keyed(tools.prompt(PROMPT, 4), [pair.ref])
    await tools.eventually(
        lambda: any(a.reading_since < float("inf") for a in pair.decode._host.running), "a read"
    )
    await pair.session.cancel(key)
    assert (await answer.wait()).reason == "cancelled"
    await becomes(pair.decode, serving=False)
    assert "wait for a fence" in pair.decode.problems()[0]
    gate.set()
    await becomes(pair.decode, serving=True)
