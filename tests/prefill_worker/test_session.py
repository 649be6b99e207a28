"""A decode instance that takes nothing off prefill's hands costs it one session, and no more."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from baton.core.config import EngineConfig, WorkerConfig
from baton.core.handover import PROTOCOL_VERSION, Offer, ToDecode
from baton.core.ids import RequestId
from baton.core.request import GenerateRequest
from baton.core.sharded_layout import ShardedLayout
from baton.core.topology import Role
from baton.executor.late_device import LateDevice
from baton.executor.staging import Staging
from baton.prefill_worker import service, session
from baton.prefill_worker.worker import PrefillWorker
from baton.proto import worker_pb2 as pb
from baton.proto import worker_pb2_grpc as pb_grpc
from baton.proto.convert_layout import layout_proto

SOON = 30.0


def opening(worker: PrefillWorker) -> pb.ToPrefill:
    """The first message of a decode instance with a prompt of several chunks."""
    request = pb.Request(request_id="r", prompt=range(1, 400), max_tokens=4, top_p=1.0)
    message = pb.Open(
        version=PROTOCOL_VERSION,
        compatibility=worker.instance.compatibility,
        layout=layout_proto(ShardedLayout(worker.instance.layout)),
        decode_instance="decode-0",
        decode_incarnation=7,
        ticket=b"t" * 16,
        request=request,
    )
    return pb.ToPrefill(open=message)


@pytest.mark.parametrize(("queue", "write_timeout_s"), [(4, 600.0), (4096, 0.1)])
async def test_a_session_whose_offers_are_not_taken_is_given_up(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch, queue: int, write_timeout_s: float
) -> None:
    monkeypatch.setattr(session, "_QUEUE", queue)
    monkeypatch.setattr(session, "_WRITE_TIMEOUT_S", write_timeout_s)
    writer = service._writer

    def slow_writer(context: Any) -> Callable[[ToDecode], Awaitable[None]]:
        write_now = writer(context)

        async def write(message: ToDecode) -> None:
            if isinstance(message, Offer):
                await asyncio.Event().wait()
            await write_now(message)

        return write

    monkeypatch.setattr(service, "_writer", slow_writer)
    config = WorkerConfig(
        instance_id="prefill-0",
        role=Role.PREFILL,
        model_dir=tiny_llama_dir,
        model_name="tiny",
        engine=EngineConfig(kv_memory_mib=8, max_batch_tokens=32),
    )
    async with await PrefillWorker.start(config, on_progress=lambda _: None) as worker:
        async with grpc.aio.insecure_channel(worker.info.address) as channel:
            call = pb_grpc.PrefillStub(channel).Handover()
            await call.write(opening(worker))
            async with asyncio.timeout(SOON):
                while await call.read() is not grpc.aio.EOF:
                    pass
        assert worker.stats()["handover_deadline_exceeded"] == 1
        assert worker.stats()["sessions"] == 0
        # The engine still serves others.
        seq = worker.instance.engine.submit(GenerateRequest(RequestId("s"), (1, 2, 3), 1))
        async with asyncio.timeout(SOON):
            await worker.instance.engine.idle()
        worker.instance.engine.release(seq)


async def test_pages_that_are_being_written_come_back_when_that_is_done(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = WorkerConfig(
        instance_id="prefill-0",
        role=Role.PREFILL,
        model_dir=tiny_llama_dir,
        model_name="tiny",
        engine=EngineConfig(kv_memory_mib=8, max_batch_tokens=32),
    )
    loop, begun, go_on = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
    copy_out = Staging.copy_out

    def slow(*arguments: Any) -> None:
        loop.call_soon_threadsafe(begun.set)
        asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result(SOON)
        copy_out(*arguments)

    monkeypatch.setattr(Staging, "copy_out", slow)
    device = LateDevice()
    worker = await PrefillWorker.start(config, on_progress=lambda _: None, device=device)
    async with worker:
        staging = worker.instance.memory.staging
        assert staging is not None
        async with grpc.aio.insecure_channel(worker.info.address) as channel:
            call = pb_grpc.PrefillStub(channel).Handover()
            await call.write(opening(worker))
            async with asyncio.timeout(SOON):
                await begun.wait()
                call.cancel()
                while worker.stats()["sessions"]:  # noqa: ASYNC110 (there is no event for it)
                    await asyncio.sleep(0)
            assert staging.pool.stats().free == staging.pool.stats().total - 25
            go_on.set()
            async with asyncio.timeout(SOON):
                while worker.stats()["tasks"]:  # noqa: ASYNC110 (there is no event for it)
                    await asyncio.sleep(0)
            staging.pool.check(idle=True)
    device.check()
