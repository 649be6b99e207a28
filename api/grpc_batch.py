"""One call of GenerateBatch: many requests side by side, and one writer for all of them."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing

from baton.core.errors import BatonError, Cancelled, InternalError, InvalidRequest
from baton.core.log import get_logger
from baton.proto import inference_pb2 as pb
from baton.proto.errors import MalformedMessage, error_message

_log = get_logger("grpc")

MAX_OPEN = 64
"""Requests of one call at once; further ones stay on the wire."""
MAX_ID = 64
"""Characters of an id."""
_AHEAD = 16
"""Messages that may wait for the connection to take them."""

Answer = Callable[[pb.GenerateRequest], AsyncGenerator[pb.GenerateResponse, None]]
"""Checks and runs one request; raises BatonError."""


class Batch:
    """Reads requests, runs at most MAX_OPEN of them at once, and writes what comes of them.

        reader ──▶ a task per open request ──▶ a small queue ──▶ the writer: `run` itself

    Whatever is full holds up what is before it: a client that does not read stalls the tasks, and
    a call with MAX_OPEN requests open stops the reader, so that HTTP/2 holds up the client.
    """

    def __init__(self, answer: Answer, write: Callable[[pb.BatchResponse], Awaitable[None]]):
        """`write` takes a message once the client has room for it, and raises if it takes none."""
        self._answer = answer
        self._write = write
        self._room = asyncio.Semaphore(MAX_OPEN)
        self._open: dict[str, asyncio.Task[None]] = {}
        self._unwanted: set[asyncio.Task[None]] = set()
        """Those that the client has cancelled one by one."""
        self._told: asyncio.Queue[pb.BatchResponse | InvalidRequest | None] = asyncio.Queue(_AHEAD)

    def __repr__(self) -> str:
        return f"Batch(open={len(self._open)})"

    async def run(self, requests: AsyncIterator[pb.BatchRequest]) -> None:
        """Serve until the client has sent all and each request has ended; raises InvalidRequest.

        So is what `write` raises. However it ends, every request has ended then.
        """
        await self._write(pb.BatchResponse(opened=pb.BatchOpened(max_open=MAX_OPEN)))
        failed: Exception | None = None
        async with asyncio.TaskGroup() as group:
            reader = group.create_task(self._read(requests))
            try:
                while isinstance(told := await self._told.get(), pb.BatchResponse):
                    await self._write(told)
                failed = told
            except Exception as error:  # raised below, and not as one of a group
                failed = error
                reader.cancel()
        if failed is not None:
            raise failed

    async def _read(self, requests: AsyncIterator[pb.BatchRequest]) -> None:
        refused = None
        async with asyncio.TaskGroup() as group:
            try:
                async for request in requests:
                    await self._take(request, group)
            except (InvalidRequest, MalformedMessage) as error:
                malformed = InvalidRequest("message", "bytes", "a BatchRequest")
                refused = error if isinstance(error, InvalidRequest) else malformed
                for task in self._open.values():
                    task.cancel()
        await self._told.put(refused)

    async def _take(self, request: pb.BatchRequest, group: asyncio.TaskGroup) -> None:
        match request.WhichOneof("action"):
            case "generate":
                await self._begin(request, group)
            case "cancel":
                if (task := self._open.get(request.id)) is not None:
                    self._unwanted.add(task)
                    task.cancel()
            case _:
                raise InvalidRequest("action", None, "generate or cancel")

    async def _begin(self, request: pb.BatchRequest, group: asyncio.TaskGroup) -> None:
        if not 1 <= len(request.id) <= MAX_ID:
            raise InvalidRequest("id", request.id, f"1 to {MAX_ID} characters")
        if request.id in self._open:
            # Nobody could tell their answers apart: the call ends, and not the request alone.
            raise InvalidRequest("id", request.id, "an id that no open request of the call has")
        await self._room.acquire()
        task = group.create_task(self._run(request))
        self._open[request.id] = task
        task.add_done_callback(self._ended)
        # A task that is cancelled before its first step would never tell.
        await asyncio.sleep(0)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._unwanted.discard(task)
        self._room.release()

    async def _run(self, request: pb.BatchRequest) -> None:
        """Tell all that comes of one request; its id is free before its last message is told."""
        task = asyncio.current_task()
        assert task is not None
        try:
            async with aclosing(self._answer(request.generate)) as responses:
                await self._pass_on(request, responses)
        except asyncio.CancelledError:
            if task not in self._unwanted or task.cancelling() > 1:
                raise  # with the whole call: nobody reads what is told
            task.uncancel()
            await self._fail(request.id, Cancelled("the caller asked for it"))
        except BatonError as error:
            await self._fail(request.id, error)
        except Exception as bug:
            _log.error("a bug ended a request of a batch", exc_info=bug)
            internal = InternalError(f"{type(bug).__name__} in the gateway; see its log")
            await self._fail(request.id, internal)
        finally:
            if self._open.get(request.id) is task:
                del self._open[request.id]

    async def _pass_on(
        self, request: pb.BatchRequest, responses: AsyncIterator[pb.GenerateResponse]
    ) -> None:
        choices = request.generate.n if request.generate.HasField("n") else 1
        async for response in responses:
            choices -= bool(response.finish_reason)
            if choices == 0:
                del self._open[request.id]
            await self._told.put(pb.BatchResponse(id=request.id, response=response))

    async def _fail(self, request_id: str, error: BatonError) -> None:
        self._open.pop(request_id, None)
        await self._told.put(pb.BatchResponse(id=request_id, error=error_message(error)))
