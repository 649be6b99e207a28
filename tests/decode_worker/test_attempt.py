"""What an attempt of a handover gives back, and how soon, when its stream goes wrong."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from baton.core.config import EngineConfig, HandoverConfig, WorkerConfig
from baton.core.topology import Role
from baton.decode_worker.worker import DecodeWorker
from baton.proto import worker_pb2 as pb
from baton.proto import worker_pb2_grpc as pb_grpc
from baton.proto.grpc_runtime import WorkerServer

SOON = 20.0
NEVER_S = 600.0


class ScriptedPrefill(pb_grpc.PrefillServicer):
    """A prefill leader that says what it is told to, and reads nothing after Open."""

    def __init__(self, *answers: pb.ToDecode) -> None:
        self.opened: asyncio.Queue[pb.Open] = asyncio.Queue()
        self.ended = asyncio.Event()
        self._answers = answers

    async def Handover(self, request_iterator: AsyncIterator[Any], context: Any) -> None:
        try:
            async for message in request_iterator:
                await self.opened.put(message.open)
                break
            for answer in self._answers:
                await context.write(answer)
            await asyncio.Event().wait()
        finally:
            self.ended.set()


@pytest.fixture
async def worker(tiny_llama_dir: Path) -> AsyncIterator[DecodeWorker]:
    waits = ("accept_timeout_s", "offer_timeout_s", "room_timeout_s", "read_timeout_s")
    config = WorkerConfig(
        instance_id="decode-0",
        role=Role.DECODE,
        model_dir=tiny_llama_dir,
        model_name="tiny",
        engine=EngineConfig(kv_memory_mib=8),
        handover=HandoverConfig(**dict.fromkeys(waits, NEVER_S)),
    )
    async with await DecodeWorker.start(config, on_progress=lambda _: None) as worker:
        yield worker


@pytest.fixture
async def session(worker: DecodeWorker) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(worker.info.address) as channel:
        call = pb_grpc.DecodeStub(channel).Session()
        await call.read()
        yield call
        call.cancel()


@pytest.fixture
async def serve() -> AsyncIterator[Any]:
    servers: list[WorkerServer] = []

    async def start(prefill: ScriptedPrefill) -> str:
        server = await WorkerServer.start(
            "127.0.0.1", 0, lambda s: pb_grpc.add_PrefillServicer_to_server(prefill, s)
        )
        servers.append(server)
        return server.address

    yield start
    for server in servers:
        await server.close(0)


def submit(key: int, address: str, incarnation: int, prompt: Any = (1, 2, 3)) -> pb.GatewayFrame:
    request = pb.Request(request_id=f"r{key}", prompt=prompt, max_tokens=2, top_p=1.0)
    ref = pb.InstanceRef(instance_id="prefill-0", address=address, incarnation=incarnation)
    return pb.GatewayFrame(
        submit=pb.Submit(key=key, request=request, prefill=[ref], timeout_s=NEVER_S)
    )


async def finish_of(session: Any, key: int) -> pb.Finish:
    async with asyncio.timeout(SOON):
        while True:
            for update in (await session.read()).updates:
                if update.key == key and update.HasField("finish"):
                    return update.finish


async def test_a_stream_whose_channel_is_closed_is_told_of_at_once(
    worker: DecodeWorker, session: Any, serve: Any
) -> None:
    prefill = ScriptedPrefill()
    address = await serve(prefill)
    await session.write(submit(1, address, incarnation=1))
    await prefill.opened.get()
    await session.write(submit(2, address, incarnation=2))  # drops the channel of the old one
    finish = await finish_of(session, 1)
    assert (finish.reason, finish.local_prefill) == ("length", True)
    await session.write(pb.GatewayFrame(cancel=pb.Cancel(key=2)))
