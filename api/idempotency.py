"""Requests with an idempotency key run once: who repeats one gets the answer of the first.

        begin ──▶ running ──whole answer──▶ kept ──KEEP_S, or newer ones──▶ forgotten
                  │   ▲ └─error──▶ forgotten
     last reader leaves, another comes within LINGER_S

A run is a task of its own, and what it told is kept for all readers: who comes later reads from the
beginning. An answer is bounded by its request's max_tokens, and so is what is kept.
"""

import asyncio
import functools
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from baton.core.errors import BatonError, Cancelled, InternalError, InvalidRequest
from baton.core.tasks import TaskSet
from baton.proto import inference_pb2 as pb

KEEP_S = 60.0
"""How long a whole answer is kept after its end."""
LINGER_S = 10.0
"""How long a run goes on that nobody reads: its client may come back."""
MAX_KEPT = 256
"""Whole answers; the oldest is forgotten for a newer one."""
MAX_KEY = 128
"""Characters of a key."""

Answer = AsyncGenerator[pb.GenerateResponse, None]
Name = tuple[str, str]
"""(tenant, key): no tenant meets the keys of another."""


class Run:
    """One request that runs once, for any number of readers."""

    def __init__(self, request_id: str, fingerprint: bytes) -> None:
        self.request_id = request_id
        self.fingerprint = fingerprint
        """Of the request: the same key with another one is a mistake."""
        self.task: asyncio.Task[BatonError | None] | None = None
        self._told: list[pb.GenerateResponse] = []
        self._error: BatonError | None = None
        self._over = False
        self._changed = asyncio.Event()
        self._readers = 0
        self._leaving: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"Run({self.request_id}, told={len(self._told)}, readers={self._readers})"

    async def work(self, answer: Answer) -> BatonError | None:
        """Take the whole answer; return what ended it, if that was an error."""
        try:
            async with aclosing(answer):
                async for response in answer:
                    self._told.append(response)
                    self._tell()
        except BatonError as error:
            return error
        return None

    def end(self, error: BatonError | None) -> None:
        """Tell the readers that nothing follows."""
        self._error, self._over = error, True
        self._tell()

    def linger(self) -> None:
        """Let it go on for a while without a reader."""
        if not self._readers and not self._over and self.task is not None:
            loop = asyncio.get_running_loop()
            self._leaving = loop.call_later(LINGER_S, self.task.cancel)

    def _tell(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def read(self) -> Answer:
        """Yield all of the answer, from its beginning; raises what ended it."""
        self._readers += 1
        if self._leaving is not None:
            self._leaving.cancel()
        position = 0
        try:
            while True:
                while position < len(self._told):
                    position += 1
                    yield self._told[position - 1]
                if self._error is not None:
                    raise self._error
                if self._over:
                    return
                await self._changed.wait()
        finally:
            self._readers -= 1
            self.linger()


class Runs:
    """The runs of one gateway by their keys; on one event loop."""

    def __init__(self) -> None:
        self._runs: dict[Name, Run] = {}
        self._kept: dict[Name, asyncio.TimerHandle] = {}
        """Whole answers, oldest first, and when they are forgotten."""
        self._tasks = TaskSet()

    def __repr__(self) -> str:
        return f"Runs({len(self._runs)}, kept={len(self._kept)})"

    def begin(
        self, name: Name, request_id: str, fingerprint: bytes, answer: Callable[[], Answer]
    ) -> Run:
        """Return the run of that name: the one that is there, or else a new one.

        Raises InvalidRequest if the one that is there is of another request.
        """
        found = self._runs.get(name)
        if found is None:
            found = self._runs[name] = Run(request_id, fingerprint)
            found.task = self._tasks.start(found.work(answer()))
            found.task.add_done_callback(functools.partial(self._ended, name, found))
            found.linger()
        elif found.fingerprint != fingerprint:
            allowed = "a key that no other request has"
            raise InvalidRequest("idempotency_key", name[1], allowed)
        return found

    def _ended(self, name: Name, run: Run, task: asyncio.Task[BatonError | None]) -> None:
        if task.cancelled():
            error: BatonError | None = Cancelled("nobody came back for the answer")
        elif (bug := task.exception()) is not None:
            error = InternalError(f"{type(bug).__name__} in the gateway; see its log")
        else:
            error = task.result()
        run.end(error)
        if error is not None:
            del self._runs[name]  # it may well work the next time
            return
        if len(self._kept) >= MAX_KEPT:
            self._forget(next(iter(self._kept)))
        loop = asyncio.get_running_loop()
        self._kept[name] = loop.call_later(KEEP_S, self._forget, name)

    def _forget(self, name: Name) -> None:
        self._kept.pop(name).cancel()
        del self._runs[name]

    async def close(self) -> None:
        """End what runs, and forget all."""
        await self._tasks.drain(0)
        for name in list(self._kept):
            self._forget(name)
        assert not self._runs, self._runs
