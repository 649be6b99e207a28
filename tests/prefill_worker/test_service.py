"""What a prefill leader does with handover streams that misbehave, seen through the stub."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from baton.core.config import EngineConfig, HandoverConfig, WorkerConfig
from baton.core.handover import PROTOCOL_VERSION
from baton.core.sharded_layout import ShardedLayout
from baton.core.topology import Role
from baton.prefill_worker.worker import PrefillWorker
from baton.proto import worker_pb2 as pb
from baton.proto import worker_pb2_grpc as pb_grpc
from baton.proto.convert_layout import layout_proto

TIMEOUT_S = 30.0


@pytest.fixture
def deadlines() -> HandoverConfig:
    """Too long to be reached; a test of a deadline parametrizes it."""
    return HandoverConfig(accept_timeout_s=600, received_timeout_s=600)


@pytest.fixture
async def worker(tiny_llama_dir: Path, deadlines: HandoverConfig) -> AsyncIterator[PrefillWorker]:
    config = WorkerConfig(
        instance_id="prefill-0",
        role=Role.PREFILL,
        model_dir=tiny_llama_dir,
        model_name="tiny",
        engine=EngineConfig(kv_memory_mib=8, max_batch_tokens=32),
        handover=deadlines,
    )
    async with await PrefillWorker.start(config, on_progress=lambda _: None) as worker:
        yield worker
        assert worker.stats()["blocks_used"] == 0


@pytest.fixture
async def call(worker: PrefillWorker) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(worker.info.address) as channel:
        call = pb_grpc.PrefillStub(channel).Handover()
        yield call
        call.cancel()


def open_message(worker: PrefillWorker, **changes: Any) -> pb.ToPrefill:
    fields: dict[str, Any] = {
        "version": PROTOCOL_VERSION,
        "compatibility": worker.instance.compatibility,
        "layout": layout_proto(ShardedLayout(worker.instance.layout)),
        "decode_instance": "decode-0",
        "decode_incarnation": 7,
        "ticket": b"t" * 16,
        "attempt": 2,
        "request": pb.Request(request_id="r", prompt=range(1, 71), max_tokens=4, top_p=1.0),
    }
    return pb.ToPrefill(open=pb.Open(**(fields | changes)))


async def everything(call: Any) -> list[pb.ToDecode]:
    """All messages until prefill closes the stream."""
    messages: list[pb.ToDecode] = []
    async with asyncio.timeout(TIMEOUT_S):
        while (message := await call.read()) is not grpc.aio.EOF:
            messages.append(message)
    return messages


async def until_last_offer(call: Any) -> list[pb.Offer]:
    assert (await call.read()).accepted.incarnation
    offers: list[pb.Offer] = []
    async with asyncio.timeout(TIMEOUT_S):
        while not offers or not offers[-1].HasField("first"):
            offers.append((await call.read()).offer)
    return offers


async def test_offers_cover_the_prompt_once_and_received_frees_it(
    worker: PrefillWorker, call: Any
) -> None:
    await call.write(open_message(worker))
    offers = await until_last_offer(call)
    assert [o.index for o in offers] == list(range(len(offers)))
    assert len(offers) >= 3  # 70 tokens in chunks of 32
    assert offers[-1].first.chunks == 3
    blocks = [(o.first_block + i, b.block) for o in offers for i, b in enumerate(o.blocks)]
    assert [index for index, _ in blocks] == [0, 1, 2, 3, 4]
    assert len({block for _, block in blocks}) == 5
    assert worker.stats()["blocks_used"] == 5
    await call.write(pb.ToPrefill(received=pb.Received(attempt=2)))
    assert await everything(call) == []
    assert worker.stats()["handover_ok"] == 1


async def test_a_drain_lets_what_is_offered_be_read(worker: PrefillWorker, call: Any) -> None:
    await call.write(open_message(worker))
    await until_last_offer(call)
    drain = asyncio.create_task(worker.drain(TIMEOUT_S))
    await asyncio.sleep(0)
    async with grpc.aio.insecure_channel(worker.info.address) as channel:
        late = pb_grpc.PrefillStub(channel).Handover()
        await late.write(open_message(worker))
        [refused] = await everything(late)
    assert refused.refused.code == "draining"
    assert not drain.done()
    await call.write(pb.ToPrefill(received=pb.Received(attempt=2)))
    assert await everything(call) == []
    assert await drain == 0
    assert worker.stats()["handover_ok"] == 1


async def test_what_is_open_at_the_deadline_of_a_drain_is_given_up(
    worker: PrefillWorker, call: Any
) -> None:
    await call.write(open_message(worker))
    await until_last_offer(call)
    assert await worker.drain(0.0) == 1
    [refused] = await everything(call)
    assert refused.refused.code == "draining"
    assert worker.stats()["sessions"] == 0


@pytest.mark.parametrize(
    "deadlines", [HandoverConfig(accept_timeout_s=600, received_timeout_s=0.6)]
)
async def test_nobody_says_received(worker: PrefillWorker, call: Any) -> None:
    await call.write(open_message(worker))
    await until_last_offer(call)
    [refused] = await everything(call)
    assert refused.refused.code == "deadline_exceeded"
    assert "to be read" in refused.refused.message


@pytest.mark.parametrize("deadlines", [HandoverConfig(accept_timeout_s=0.3)])
async def test_nobody_says_open(call: Any, worker: PrefillWorker) -> None:
    await call.wait_for_connection()
    [refused] = await everything(call)
    assert refused.refused.code == "deadline_exceeded"


@pytest.mark.parametrize(
    ("changes", "code", "what"),
    [
        ({"version": 9}, "incompatible", "protocol 9"),
        ({"compatibility": "other"}, "incompatible", "other"),
        ({"ticket": b"short"}, "handover_failed", "ticket"),
        ({"request": pb.Request(request_id="r", max_tokens=1)}, "invalid_request", "prompt"),
        (
            {"request": pb.Request(request_id="r", prompt=[1] * 9000, max_tokens=1, top_p=1)},
            "invalid_request",
            "",
        ),
    ],
    ids=["version", "model", "ticket", "no prompt", "never fits"],
)
async def test_a_bad_open_is_refused_with_the_reason(
    worker: PrefillWorker, call: Any, changes: dict[str, Any], code: str, what: str
) -> None:
    await call.write(open_message(worker, **changes))
    messages = [m for m in await everything(call) if m.HasField("refused")]
    assert [m.refused.code for m in messages] == [code]
    assert what in messages[0].refused.message


@pytest.mark.parametrize("how", ["abort", "half close", "cancel"])
async def test_decode_goes_away_in_the_middle(worker: PrefillWorker, call: Any, how: str) -> None:
    await call.write(open_message(worker))
    await call.read()
    assert worker.stats()["sessions"] == 1
    if how == "abort":
        await call.write(pb.ToPrefill(abort=pb.Abort(attempt=2, reason="test")))
    elif how == "half close":
        await call.done_writing()
    else:
        call.cancel()
    if how != "cancel":
        await everything(call)
    async with asyncio.timeout(TIMEOUT_S):
        while worker.stats()["sessions"]:  # noqa: ASYNC110 (the server's end of the stream)
            await asyncio.sleep(0.005)
        await worker.instance.engine.idle()
    worker.check()
