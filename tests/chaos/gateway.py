"""The gateway's side of a session, spoken with the stubs; tells of every token as it comes."""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc

from baton.core.ids import RequestId
from baton.core.request import GenerateRequest, SamplingParams
from baton.proto import worker_pb2 as pb
from baton.proto import worker_pb2_grpc as pb_grpc
from baton.proto.convert import request_proto
from baton.proto.grpc_runtime import open_channel

from .process import PATIENCE_S
from .schedule import Entry

Happened = Callable[[str], None]


@dataclass
class Answer:
    """What came for one request."""

    key: int
    tokens: list[int] = field(default_factory=list)
    finishes: list[pb.Finish] = field(default_factory=list)
    after_the_last: int = 0
    """Updates that came although it had ended."""
    done: asyncio.Event = field(default_factory=asyncio.Event)
    """It has ended, or its stream has."""


class Gateway:
    """One Session stream; made by `open_gateway`."""

    def __init__(self, call: Any, happened: Happened) -> None:
        self.hung_up = False
        self._call = call
        self._happened = happened
        self._one_by_one = asyncio.Lock()
        self._keys = itertools.count(1)
        self._answers: dict[int, Answer] = {}

    async def submit(self, entry: Entry, prefill: Sequence[pb.InstanceRef]) -> Answer:
        """Send a request."""
        key = next(self._keys)
        answer = self._answers[key] = Answer(key)
        sampling = SamplingParams(temperature=entry.temperature, seed=entry.seed)
        request = GenerateRequest(
            RequestId(f"request-{key}"), entry.prompt, entry.max_tokens, sampling, ()
        )
        submit = pb.Submit(
            key=key, request=request_proto(request), prefill=prefill, timeout_s=PATIENCE_S
        )
        await self._write(pb.GatewayFrame(submit=submit))
        return answer

    async def cancel(self, answer: Answer) -> None:
        """Cancel a request."""
        await self._write(pb.GatewayFrame(cancel=pb.Cancel(key=answer.key)))

    async def _write(self, frame: pb.GatewayFrame) -> None:
        async with self._one_by_one:
            if not self.hung_up:
                with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                    await self._call.write(frame)  # `pump` says how the stream ended

    def hang_up(self) -> int:
        """Go away; return how many requests were open."""
        self.hung_up = True
        self._call.cancel()
        return sum(not answer.finishes for answer in self._answers.values())

    async def pump(self) -> None:
        """Take what comes until the stream ends."""
        try:
            while (frame := await self._call.read()) is not grpc.aio.EOF:
                for update in frame.updates:
                    self._take(update)
        finally:
            for answer in self._answers.values():
                answer.done.set()

    def _take(self, update: pb.Update) -> None:
        answer = self._answers[update.key]
        answer.after_the_last += bool(answer.finishes)
        answer.tokens += update.tokens
        if update.HasField("finish"):
            answer.finishes.append(update.finish)
            answer.done.set()
        self._happened("done" if update.HasField("finish") else "token")


@asynccontextmanager
async def open_gateway(address: str, happened: Happened) -> AsyncIterator[Gateway]:
    """Open a session with the decode instance at `address`."""
    async with contextlib.AsyncExitStack() as stack:
        channel = await stack.enter_async_context(open_channel(address))
        call = pb_grpc.DecodeStub(channel).Session()
        async with asyncio.timeout(PATIENCE_S):
            await call.read()
        gateway = Gateway(call, happened)
        pump = asyncio.create_task(gateway.pump())
        try:
            yield gateway
        finally:
            call.cancel()
            with contextlib.suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
                await pump
