"""The leader's side of an instance with many ranks: gathers them, tells them what to do, watches.

Ranks live and die together. A rank whose connection ends, that is silent, or a step that makes no
progress ends the instance: `on_lost` is called, once, and by default ends this process, which the
other ranks and the cluster notice at once.
"""

import asyncio
import contextlib
import os
import socket
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from baton.core.config import LeaderRef, ParallelConfig, WorkerConfig
from baton.core.errors import (
    BatonError,
    DeadlineExceeded,
    InstanceLost,
    InvalidConfig,
    TransportError,
)
from baton.core.ids import Incarnation, SeqId
from baton.core.log import get_logger
from baton.engine.step import StepPlan, StepResult
from baton.engine.step_diff import StepEncoder
from baton.executor.control_link import TICK_S, ControlLink, accept, packed
from baton.executor.control_messages import error_from, result_from
from baton.kv_transfer.link.auth import MIN_SECRET
from baton.kv_transfer.link.server import Server

EXIT_CODE = 70
"""Of a process that ends because its instance cannot go on."""
_CLOSE_TIMEOUT_S = 10.0

_log = get_logger("ranks")

OnLost = Callable[[InstanceLost], None]
Say = Callable[[str], None]
Progress = tuple[int, int]
"""A step, and how many of its layers are computed; all before that step are computed whole."""
ALL_LAYERS = 1 << 30
"""More than any model has."""
OnListening = Callable[[LeaderRef], None]
"""Told where the other ranks find the leader, which then waits for them."""


def end_process(error: InstanceLost) -> None:
    """End this process: half an instance has no use, and would hang every request."""
    _log.error("the instance ends", reason=str(error))
    os._exit(EXIT_CODE)


def nobody(leader: LeaderRef) -> None:
    """Tell nobody: there are no other ranks."""


def rank_name(instance_id: str, rank: int) -> str:
    """Return the name of a rank's process, unique in the cluster; the leader's is its instance's.

    Others have a `/`, which no instance has.
    """
    return instance_id if rank == 0 else f"{instance_id}/{rank}"


def secret_of(config: WorkerConfig) -> bytes:
    """Return the cluster's secret; InvalidConfig if there is none, which ranks must share."""
    secret = config.handover.secret.get_secret_value().encode()
    if len(secret) < MIN_SECRET:
        allowed = f"at least {MIN_SECRET} bytes, for an instance with more than one rank"
        raise InvalidConfig("handover.secret", f"{len(secret)} bytes", allowed)
    return secret


class RankGroup:
    """All ranks of an instance but the leader, as it sees them; empty if there are no others."""

    def __init__(
        self, config: WorkerConfig, incarnation: Incarnation, on_lost: OnLost = end_process
    ) -> None:
        self._limits: ParallelConfig = config.parallel
        self._owner = (config.instance_id, int(incarnation))
        self._host = config.host
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._names = {
            rank_name(config.instance_id, rank): rank for rank in range(1, config.parallel.size)
        }
        self._links: dict[int, ControlLink] = {}
        self._joined = asyncio.Event()
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._last_call = 0
        self._encoder = StepEncoder()
        self._counters: dict[int, dict[str, int]] = {}
        """What each rank has told last."""
        self._steps: dict[int, _Gathered] = {}
        """The steps under way."""
        self.progress: Progress = (-1, 0)
        """How far the leader knows that steps are computed, on all ranks or soon on them too."""
        self.steps_ended: Progress = (-1, 0)
        """Which steps have ended for the leader, and on other ranks will before long."""
        self._lock = threading.Lock()
        self._ended = False
        self._server: Server | None = None
        self._watch: asyncio.Task[None] | None = None
        self._port = 0
        if self._names:
            self._secret = secret_of(config)
            listener = socket.create_server((config.host, 0))
            self._port = listener.getsockname()[1]
            self._server = Server(listener, self._serve)
            self._watch = asyncio.create_task(self._watch_ranks())

    def __repr__(self) -> str:
        return f"<RankGroup of {self._owner[0]}, {len(self._links)} of {len(self._names)} others>"

    @property
    def leader(self) -> LeaderRef:
        """Where the other ranks find this one."""
        assert self._port, "there are no other ranks"
        return LeaderRef(host=self._host, port=self._port, incarnation=self._owner[1])

    def counters(self, own: dict[str, int]) -> dict[str, int]:
        """Return the sums of the leader's own counters and the other ranks', by name.

        Those are what they have told last: some seconds ago, or later if nothing has changed.
        """
        total = Counter(own)
        for told in list(self._counters.values()):
            total.update(told)
        return dict(total)

    async def join(self) -> None:
        """Wait until all ranks are connected; DeadlineExceeded names those that are not."""
        if not self._names:
            return
        try:
            async with asyncio.timeout(self._limits.join_timeout_s):
                await self._joined.wait()
        except TimeoutError:
            missing = [name for name, rank in self._names.items() if rank not in self._links]
            limit = f"{self._limits.join_timeout_s:g} s"
            raise DeadlineExceeded(f"not connected within {limit}: {', '.join(missing)}") from None

    async def call(self, rank: int, method: str, *arguments: Any) -> Any:
        """Call a method of another rank and return its result, or raise its error.

        There is no time limit: a rank that does not answer ends the instance.
        """
        number, answer = self.new_number(), self._loop.create_future()
        self._calls[number] = answer
        try:
            self._links[rank].send(["call", number, method, arguments])
            return await answer
        finally:
            del self._calls[number]

    def new_number(self) -> int:
        """Return a number that was never returned before, to name something on all ranks."""
        self._last_call += 1
        return self._last_call

    async def call_all(self, method: str, *arguments: Any) -> list[Any]:
        """Call the same method of all other ranks; return their results in order.

        All have answered when this returns or raises.
        """
        calls = [self.call(rank, method, *arguments) for rank in sorted(self._links)]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return list(answers)

    def begin(self, plan: StepPlan, ends: Sequence[int] = ()) -> Future[StepResult]:
        """Let all ranks compute a plan; return a future of its result, which some of them tell.

        `ends` are the layers of which the leader will say in `progress` that they are computed.
        Called from the model's thread, and for every plan.
        """
        gathered = self._steps[plan.step] = _Gathered(plan.step, self._limits.places)
        message = packed(["step", self._encoder.encode(plan), list(ends)])
        for link in self._links.values():
            link.send_packed(message)
        return gathered.future

    def tell(self, step: int, told: StepResult | BatonError) -> None:
        """Take the result of a step for one place, or why there is none; any thread."""
        with self._lock:
            gathered = self._steps[step]
            if not gathered.take(told):
                return
            del self._steps[step]
            self.steps_ended = max(self.steps_ended, (step, ALL_LAYERS))
        self.reached((step, ALL_LAYERS))
        gathered.settle()

    def reached(self, progress: Progress) -> None:
        """Let the leader know that steps are computed so far; any thread, in any order."""
        with self._lock:
            self.progress = max(self.progress, progress)

    def lose(self, reason: str) -> None:
        """End the instance; from any thread."""
        with self._lock:
            first, self._ended = not self._ended, True
        if first:
            self._on_lost(InstanceLost(f"{self._owner[0]} cannot go on: {reason}"))

    async def close(self) -> None:
        """Let all other ranks close, and end the connections. Safe to repeat."""
        with self._lock:
            closed, self._ended = self._ended, True
        if not closed:
            with contextlib.suppress(TimeoutError, BatonError):
                async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                    await self.call_all("close")
        if self._watch is not None:
            self._watch.cancel()
        for link in self._links.values():
            link.close()
        if self._server is not None:
            await asyncio.to_thread(self._server.stop)

    async def _watch_ranks(self) -> None:
        """Send heartbeats, and notice a step that has been the oldest for too long.

        Counted in rounds, and not by the clock: if it was this process that stood still, one round
        has passed.
        """
        oldest, rounds = -1, 0
        while True:
            await asyncio.sleep(TICK_S)
            for link in list(self._links.values()):
                link.beat()
            now = min(self._steps, default=-1)
            rounds = rounds + 1 if now == oldest != -1 else 0
            oldest = now
            if rounds * TICK_S > self._limits.step_timeout_s:
                self.lose(f"step {now} has made no progress for {self._limits.step_timeout_s:g} s")

    # In the threads of the connections.

    def _serve(self, connection: socket.socket) -> None:
        name = accept(connection, self._secret, self._owner)
        rank = self._names.get(name)
        if rank is None:
            raise TransportError(f"{name} is no rank of {self._owner[0]}")
        link = ControlLink(
            connection,
            silence_s=self._limits.silence_s,
            on_message=lambda message: self._heard(rank, message),
            on_end=lambda reason: self.lose(f"rank {rank} is lost: {reason}"),
        )
        with self._lock:
            if rank in self._links:
                raise TransportError(f"{name} is connected already")
            self._links[rank] = link
            all_there = len(self._links) == len(self._names)
        if all_there:
            self._loop.call_soon_threadsafe(self._joined.set)
        link.run()

    def _heard(self, rank: int, message: Sequence[Any]) -> None:
        match message:
            case ["answer", number, result, error]:
                self._loop.call_soon_threadsafe(self._answered, number, result, error)
            case ["result", result]:
                found = result_from(result)
                self.tell(found.step, found)
            case ["counters", told]:
                self._counters[rank] = told
            case ["failed", step, error]:
                self.tell(step, error_from(error))
            case _:
                raise AssertionError(f"rank {rank} said {message}")

    def _answered(self, number: int, result: Any, error: Any) -> None:
        answer = self._calls.get(number)
        if answer is None or answer.done():
            return  # who asked has been cancelled
        if error is None:
            answer.set_result(result)
        else:
            answer.set_exception(error_from(error))


class _Gathered:
    """The result of a step, told place by place along dp and ep."""

    def __init__(self, step: int, places: int) -> None:
        self.future: Future[StepResult] = Future()
        self._missing = places
        self._result = StepResult(step, {})
        self._unsound: tuple[SeqId, ...] = ()
        self._error: BatonError | None = None

    def take(self, told: StepResult | BatonError) -> bool:
        """Take one place's part; return whether it was the last."""
        if isinstance(told, BatonError):
            self._error = told
        else:
            self._result.tokens.update(told.tokens)
            self._result.logprobs.update(told.logprobs)
            self._unsound += told.unsound
            self._result.failed.update(told.failed)
        self._missing -= 1
        return self._missing == 0

    def settle(self) -> None:
        """Let whoever waits have the result, or the error."""
        if self._error is not None:
            self.future.set_exception(self._error)
        else:
            self.future.set_result(replace(self._result, unsound=self._unsound))
