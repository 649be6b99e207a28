"""A rank that follows its leader: computes its share of steps, moves its part of handovers' KV.

    control connection ── steps ──▶ queue ──▶ the model's thread ── results ──▶ leader
          (a thread)   ── calls ──▶ event loop ── answers ──▶ leader

It decides nothing. Without its leader it has no use: it ends with the connection, and if it fails.
"""

import asyncio
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from baton.core.config import LeaderRef, WorkerConfig
from baton.core.errors import InternalError, InvalidConfig
from baton.core.grammar import Grammar, GrammarKind
from baton.core.ids import Incarnation, InstanceId
from baton.core.log import get_logger
from baton.core.tasks import TaskSet
from baton.core.topology import RankInfo
from baton.engine.step import LayerWatch, StepPlan
from baton.engine.step_diff import StepDecoder
from baton.executor.control_link import TICK_S, ControlLink, connect
from baton.executor.control_messages import packed_error, packed_result
from baton.executor.device import Device
from baton.executor.gpu_mesh_runner import GpuFollowing
from baton.executor.gpu_runner import GpuRunner
from baton.executor.gpu_start import Gpu
from baton.executor.handover_orders import DigestOrder, HandoverTerms, ReadOrder
from baton.executor.rank import LoadedRank, start_rank
from baton.executor.rank_group import (
    ALL_LAYERS,
    EXIT_CODE,
    OnListening,
    Progress,
    Say,
    nobody,
    rank_name,
    secret_of,
)
from baton.executor.rank_handover import RankHandover
from baton.executor.rank_model import (
    RankModel,
    RankParts,
    check_library,
    load_share,
    measured_room,
    meeting_of,
)
from baton.executor.room import Room
from baton.kv_transfer.choose import OpenTransport, open_transport
from baton.kv_transfer.link.auth import Parties

_MAX_STEPS = 1024
"""Steps that may wait for the model's thread; the leader begins a few at once."""

_log = get_logger("rank")


class Follower:
    """One rank but the leader; made by `start`, ended by the leader or by `close`."""

    def __init__(self, config: WorkerConfig, leader: LeaderRef, parts: RankParts) -> None:
        self._config = config
        self._leader = leader
        self._parts = parts
        self._started = time.monotonic()
        self._loop = asyncio.get_running_loop()
        self._tasks = TaskSet()
        self._steps: queue.Queue[tuple[StepPlan, list[int]] | None] = queue.Queue(_MAX_STEPS)
        self._diffs = StepDecoder()
        self._progress: Progress = (-1, 0)
        self._waiting: list[tuple[Progress, asyncio.Future[None]]] = []
        """Who waits for this rank to have come so far."""
        self._handovers: dict[int, RankHandover] = {}
        """By the number that the leader gave it."""
        self._loaded: RankModel | None = None
        """Until it has a pool."""
        self._rank: LoadedRank | None = None
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._closed = asyncio.Event()
        self._closing = False
        self._link: ControlLink | None = None
        self._model = threading.Thread(target=self._run_steps, name="model", daemon=True)

    def __repr__(self) -> str:
        return f"<Follower {self.info.rank} of {self._config.instance_id}, at {self._progress}>"

    @classmethod
    async def start(
        cls,
        config: WorkerConfig,
        *,
        on_progress: Say,
        on_listening: OnListening = nobody,
        open_transport: OpenTransport = open_transport,
        device: Device | None = None,
        gpu: Gpu | None = None,
    ) -> Self:
        """Connect to the leader and load this rank's share; returns once it is ready for steps.

        It listens to nobody, and does not call `on_listening`. `device` is where the pool is to
        lie, and `gpu` what computes, if not where and what the config says.

        Raises TransportError if the leader is not there, InvalidConfig for what is not right.
        """
        leader, rank = config.leader, config.rank
        if leader is None or not 0 < rank < config.parallel.size:
            allowed = f"1 to {config.parallel.size - 1}, and a leader, for a rank that follows"
            raise InvalidConfig("rank", rank, allowed)
        follower = cls(config, leader, RankParts(on_progress, open_transport, device, gpu))
        parties = Parties(
            rank_name(config.instance_id, rank),
            leader.incarnation,
            config.instance_id,
            leader.incarnation,
        )
        address, secret = (leader.host, leader.port), secret_of(config)
        connection = await asyncio.to_thread(connect, address, secret, parties)
        link = ControlLink(
            connection,
            silence_s=config.parallel.silence_s,
            on_message=follower._heard,
            on_end=lambda reason: follower._die(f"the leader is lost: {reason}"),
        )
        follower._link = link
        threading.Thread(target=link.run, name="control", daemon=True).start()
        follower._tasks.start(follower._beat())
        await follower._ready
        on_progress(f"rank {rank} of {config.instance_id} ready")
        return follower

    @property
    def info(self) -> RankInfo:
        """What it says of itself."""
        return RankInfo(InstanceId(self._config.instance_id), self._config.rank, os.getpid())

    def stats(self) -> dict[str, float | int | str]:
        """Return its counters by name."""
        return {"rank": self._config.rank, "pid": os.getpid(), "steps": self._progress[0] + 1}

    async def close(self) -> None:
        """Give everything back, and check that nothing was held. Safe to repeat."""
        if not self._closing:
            self._closing = True
            self._steps.put(None)
            if self._model.is_alive():
                await asyncio.to_thread(self._model.join)
            for handover in list(self._handovers.values()):
                await handover.fence()
            if self._loaded is not None:
                self._loaded.membership.leave()
            if self._rank is not None:
                await self._rank.close()
            self._closed.set()
        await self._closed.wait()

    async def wait_closed(self) -> None:
        """Wait until the leader, or somebody here, has closed it."""
        await self._closed.wait()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    # What the leader says, in the connection's thread.

    def _heard(self, message: Any) -> None:
        match message:
            case ["step", packed, ends]:
                self._steps.put_nowait((self._diffs.decode(packed), ends))
            case ["call", number, method, arguments]:
                self._loop.call_soon_threadsafe(self._called, number, method, arguments)
            case _:
                raise AssertionError(f"the leader said {message}")

    def _called(self, number: int, method: str, arguments: list[Any]) -> None:
        self._tasks.start(self._answer(number, method, arguments))

    async def _answer(self, number: int, method: str, arguments: list[Any]) -> None:
        result, error = None, None
        try:
            result = await _METHODS[method](self, *arguments)
        except Exception as failure:
            _log.warning("a call failed", method=method, exc_info=failure)
            error = packed_error(failure)
        assert self._link is not None, "a call before the connection"
        self._link.send(["answer", number, result, error])

    # Methods that the leader calls.

    async def _load(self, port: int, library: str) -> None:
        """Meet the other ranks and load; `library` is what the leader's groups are made of."""
        with self._or_never_ready():
            meeting = meeting_of(self._config, port)
            check_library(self._config, meeting, library)
            self._loaded = await load_share(self._config, meeting, None, self._parts)

    async def _measure(self) -> list[Any]:
        """Return what there is room for."""
        assert self._loaded is not None, "measured before loading"
        with self._or_never_ready():
            room = await measured_room(self._config, self._loaded, self._parts)
        return room.pack()

    async def _start(self, room: list[Any]) -> tuple[bytes, bytes]:
        """Make what all ranks have room for; return how this rank's KV is read, in both ways."""
        loaded, self._loaded = self._loaded, None
        assert loaded is not None, "a start before loading"
        incarnation = Incarnation(self._leader.incarnation)
        with self._or_never_ready():
            self._rank = await start_rank(
                self._config, loaded, Room.unpack(room), incarnation, self._parts
            )
        self._model.start()
        self._ready.set_result(None)
        return self._rank.metadata()

    @contextmanager
    def _or_never_ready(self) -> Iterator[None]:
        """Let whoever waits for this rank know of an error."""
        try:
            yield
        except BaseException as error:
            if not self._ready.done():
                self._ready.set_exception(error)
                self._ready.exception()
            raise

    async def _prepare(self, kind: GrammarKind, source: str) -> None:
        """Compile a grammar, if tokens are chosen on this rank."""
        assert self._rank is not None, "a request before the start"
        if self._rank.chooses:
            await self._rank.grammars.prepare(Grammar(kind, source))

    async def _close(self) -> None:
        await self.close()

    async def _handover_open(self, number: int, packed: list[Any]) -> None:
        terms, rank = HandoverTerms.unpack(packed), self._rank
        assert rank is not None, "a handover before loading"
        self._handovers[number] = rank.handover(terms, self._config)

    async def _handover_connect(self, number: int, sources: list[bytes], blocks: int) -> None:
        await self._handovers[number].connect(sources, blocks)

    async def _handover_read(self, number: int, progress: list[int], order: list[Any]) -> list[Any]:
        step, layers = progress
        await self._until_computed((step, layers))
        report = await self._handovers[number].read(ReadOrder.unpack(order))
        return [report.bytes, report.seconds, report.transport]

    async def _handover_drop(self, number: int) -> None:
        await self._handovers[number].drop()

    async def _handover_digest(
        self, number: int, progress: list[int], order: list[Any]
    ) -> list[bytes]:
        step, layers = progress
        await self._until_computed((step, layers))
        handover = self._handovers.get(number)
        # While this waited for a step, the attempt may have been closed: nobody wants them then.
        return [] if handover is None else await handover.digest(DigestOrder.unpack(order))

    async def _handover_close(self, number: int) -> None:
        handover = self._handovers.pop(number, None)
        if handover is not None:
            await handover.fence()

    # How

    async def _beat(self) -> None:
        """Let the leader know that this event loop is alive, and what has been counted."""
        told: dict[str, int] = {}
        while not self._closed.is_set():
            assert self._link is not None, "not connected"
            self._link.beat()
            counters = {} if self._rank is None else self._rank.moved()
            if counters != told:
                told = counters
                self._link.send(["counters", told])
            await asyncio.sleep(TICK_S)

    def _run_steps(self) -> None:
        rank, link = self._rank, self._link
        assert rank is not None, "steps before loading"
        assert link is not None, "steps before the connection"
        if rank.gpu is not None:
            self._launch_steps(rank, rank.gpu)
            return
        runner = rank.runner()
        tells = rank.tells
        pool = None if rank.memory is None else rank.memory.device
        while (given := self._steps.get()) is not None:
            plan, ends = given
            try:
                result = runner.compute(plan, _settled(pool, self._watch(plan.step, ends)))
                _settle(pool)
            except InternalError as error:  # all ranks of the stage have found it
                if tells:
                    link.send(["failed", plan.step, packed_error(error)])
            except BaseException as error:
                _log.error("a step failed", exc_info=error)
                self._die(f"step {plan.step} failed: {error!r}")
                raise
            else:
                if tells and result is not None:
                    link.send(["result", packed_result(result)])
            self._loop.call_soon_threadsafe(self._computed, (plan.step, ALL_LAYERS))

    def _launch_steps(self, rank: LoadedRank, runner: GpuRunner) -> None:
        assert not rank.tells, "along tp, the leader has the result"
        device = None if rank.memory is None else rank.memory.device
        steps = GpuFollowing(runner, device, rank.steps.depth, self._step_ended)
        while (given := self._steps.get()) is not None:
            plan, ends = given
            try:
                steps.launch(plan, self._watch(plan.step, ends))
            except BaseException as error:
                self._step_ended(plan.step, error)
                raise
        steps.close()

    def _step_ended(self, step: int, error: BaseException | None) -> None:
        """Go on, or end if it failed: logits that are not finite are no failure of the step."""
        if error is not None:
            _log.error("a step failed", exc_info=error)
            self._die(f"step {step} failed: {error!r}")
        self._loop.call_soon_threadsafe(self._computed, (step, ALL_LAYERS))

    def _watch(self, step: int, ends: list[int]) -> LayerWatch | None:
        """Return what tells of layers as they are computed, if there are `ends` to tell of."""
        tell = self._loop.call_soon_threadsafe
        if not ends:
            return None
        return LayerWatch(tuple(ends), lambda layers: tell(self._computed, (step, layers)))

    def _computed(self, progress: Progress) -> None:
        self._progress = progress = max(self._progress, progress)
        for _, waits in (w for w in self._waiting if w[0] <= progress):
            waits.set_result(None)
        self._waiting = [w for w in self._waiting if w[0] > progress]

    async def _until_computed(self, progress: Progress) -> None:
        """Wait until this rank has computed what the leader knows to be computed, or nearly."""
        if progress > self._progress:
            waits: asyncio.Future[None] = self._loop.create_future()
            self._waiting.append((progress, waits))
            await waits

    def _die(self, reason: str) -> None:
        """End this process: the other ranks notice, and do the same."""
        if not self._closing:
            _log.error("this rank ends", rank=self._config.rank, reason=reason)
            os._exit(EXIT_CODE)


def _settle(pool: Device | None) -> None:
    """Wait until what this thread has started is in the pool, if that lies on a device."""
    if pool is not None:
        pool.record().wait()


def _settled(pool: Device | None, watch: LayerWatch | None) -> LayerWatch | None:
    """Tell of layers only once they are in the pool."""
    if pool is None or watch is None:
        return watch

    def reached(layers: int) -> None:
        _settle(pool)
        watch.reached(layers)

    return LayerWatch(watch.ends, reached)


_METHODS: dict[str, Callable[..., Any]] = {
    "load": Follower._load,
    "measure": Follower._measure,
    "start": Follower._start,
    "prepare": Follower._prepare,
    "close": Follower._close,
    "handover_open": Follower._handover_open,
    "handover_connect": Follower._handover_connect,
    "handover_read": Follower._handover_read,
    "handover_drop": Follower._handover_drop,
    "handover_digest": Follower._handover_digest,
    "handover_close": Follower._handover_close,
}
