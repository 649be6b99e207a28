"""One copy of the model in one role: weights, KV pool, scheduler, engine loop and transport."""

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from baton.core.compatibility import compatibility_hash
from baton.core.config import WorkerConfig
from baton.core.errors import InternalError, InvalidConfig
from baton.core.ids import Incarnation, InstanceId, new_incarnation
from baton.core.kv_layout import KVLayout
from baton.core.request import GenerateRequest
from baton.core.topology import InstanceInfo
from baton.engine.scheduler import Scheduler
from baton.executor.device import Device
from baton.executor.engine_loop import EngineLoop, Listener, Runner
from baton.executor.gpu_mesh_runner import GpuMeshRunner
from baton.executor.gpu_runner import GpuRunner
from baton.executor.gpu_start import Gpu
from baton.executor.handover_memory import HandoverMemory
from baton.executor.handover_orders import HandoverTerms
from baton.executor.kv_cache import KVCache
from baton.executor.mesh_handover import MeshHandover
from baton.executor.mesh_runner import MeshRunner
from baton.executor.paced_runner import PacedRunner
from baton.executor.rank import LoadedRank, start_rank
from baton.executor.rank_group import OnListening, RankGroup, Say, nobody
from baton.executor.rank_model import RankModel, RankParts, load_share, measured_room, meeting_of
from baton.executor.room import Room, common_room
from baton.executor.runner import ModelRunner
from baton.kv_transfer.choose import OpenTransport, open_transport
from baton.kv_transfer.sender import DirectReads
from baton.kv_transfer.transport import Transport
from baton.models.revision import revision
from baton.parallel.join import listen

T = TypeVar("T")


class Instance:
    """What both roles are made of; made by `load`, ended by `close`. One event loop only.

    This process is its leader; what all ranks do together goes through `ranks`.
    """

    def __init__(
        self,
        config: WorkerConfig,
        rank: LoadedRank,
        ranks: RankGroup,
        transports: tuple[bytes, ...],
        direct: DirectReads,
        listener: Listener,
        facts: "_Facts",
    ) -> None:
        self.config = config
        self.incarnation = facts.incarnation
        self.compatibility = facts.compatibility
        self.sharded = rank.layout
        """How KV lies on all ranks."""
        self.layout: KVLayout = rank.layout.model
        """The whole model's KV, as one rank would hold it."""
        self.kv = rank.kv
        """The leader's part of it."""
        self.transports = transports
        """How each rank's KV is read, as Accepted has it; none if it is mixed."""
        self.direct = direct
        """How each rank's KV is read where it is on devices; nothing if one of them cannot be."""
        self._rank = rank
        self._ranks = ranks
        self._facts = facts
        host_blocks = rank.host.num_blocks if rank.host is not None else 0
        steps, places = rank.steps, config.parallel.places
        self._scheduler = Scheduler(
            config.engine,
            places * rank.kv.num_blocks,
            host_blocks=places * host_blocks,
            depth=steps.depth,
            partitions=places,
            ahead=steps.ahead,
        )
        self._own: ModelRunner | GpuRunner = rank.gpu or rank.runner()
        self._paced: PacedRunner | None = None
        self.engine = EngineLoop(self._scheduler, self._runner(), listener, depth=steps.depth)
        self._running = asyncio.create_task(self.engine.run())
        self._running.add_done_callback(self._engine_ended)
        self._closing = False

    def _runner(self) -> Runner:
        """Return what the engine runs steps by: this rank, with all others, as its device does."""
        rank = self._rank
        runner: Runner = self._own
        if not self.alone:
            if isinstance(self._own, GpuRunner):
                runner = GpuMeshRunner(self._own, self._ranks)
            else:
                runner = MeshRunner(self._own, self._ranks, tells=rank.tells)
        if rank.memory is not None and rank.memory.device is not None:
            runner = self._paced = PacedRunner(runner, rank.memory.device)
        return runner

    @classmethod
    async def load(
        cls,
        config: WorkerConfig,
        listener: Listener,
        on_progress: Say,
        open_transport: OpenTransport = open_transport,
        on_listening: OnListening = nobody,
        device: Device | None = None,
        gpu: Gpu | None = None,
    ) -> "Instance":
        """Load the model and start the engine; raises InvalidConfig for what is not right.

        With more ranks than this one, wait for the others: see RankGroup. `device` is where the
        pool is to lie, and `gpu` what computes, if not where and what the config says.
        """
        facts = _Facts()
        ranks = RankGroup(config, facts.incarnation)
        try:
            rank, transports, direct = await _load_all(
                config,
                ranks,
                facts,
                RankParts(on_progress, open_transport, device, gpu),
                on_listening,
            )
            try:
                await asyncio.to_thread(facts.learn, config, rank)
                return cls(config, rank, ranks, transports, direct, listener, facts)
            except BaseException:  # the scheduler may refuse its config
                await rank.close()
                raise
        except BaseException:
            await ranks.close()
            raise

    @property
    def transport(self) -> Transport:
        """The leader's; a mixed instance has none, and is never asked for a handover."""
        if self._rank.transport is None:
            raise InvalidConfig("role", str(self.config.role), "prefill or decode, for a handover")
        return self._rank.transport

    async def prepare(self, request: GenerateRequest) -> None:
        """Compile a request's grammar, if it has one, on all ranks; it is submitted after that.

        Raises InvalidRequest if it cannot be followed, Overloaded if too many wait, and
        DeadlineExceeded.
        """
        grammar = request.sampling.grammar
        if grammar is not None:
            await self._rank.grammars.prepare(grammar)
            await self._ranks.call_all("prepare", grammar.kind, grammar.source)

    def handover(self, terms: HandoverTerms) -> MeshHandover:
        """Return all ranks' parts of an attempt; it must be closed."""
        return MeshHandover(terms, self._rank.handover(terms, self.config), self._ranks)

    @property
    def tells_layers(self) -> bool:
        """Whether the leader knows of layers when they are computed: not of those elsewhere."""
        return self.config.parallel.pp == 1

    @property
    def alone(self) -> bool:
        """Whether this process is the only rank."""
        return self.config.parallel.size == 1

    @property
    def memory(self) -> HandoverMemory:
        """What handovers read and write; a mixed instance has none."""
        assert self._rank.memory is not None, "a handover in a mixed instance"
        return self._rank.memory

    def info(self, address: str) -> InstanceInfo:
        """Return what the instance says of itself, reached at `address`."""
        config, facts = self.config, self._facts
        return InstanceInfo(
            instance_id=InstanceId(config.instance_id),
            role=config.role,
            address=address,
            incarnation=self.incarnation,
            pid=os.getpid(),
            model=config.model_name,
            compatibility=self.compatibility,
            max_model_len=facts.max_model_len(self.kv),
            kv_tokens=config.parallel.places * self.kv.num_blocks * self.layout.block_size,
            max_sequences=config.engine.max_sequences,
            load_s=facts.load_s,
            ranks=config.parallel.size,
        )

    def stats(self) -> dict[str, float | int | str]:
        """Return counters of engine, pool, collectives and transports by name.

        Transports' are those of all ranks together (see RankGroup.counters); steps and collectives
        are the leader's, which is in all of them.
        """
        loop = self.engine.stats()
        roster = loop.scheduler.roster
        pool = roster.memory.pool
        counters: dict[str, float | int | str] = {
            "executor": self._rank.model.executor,
            "steps": loop.steps,
            "busy_s": loop.busy_s,
            "rank_busy_s": self._own.stats().busy_s,
            "waiting": roster.waiting,
            "running": roster.running,
            "preemptions": roster.preemptions,
            "blocks_swapped_out": roster.memory.swap.copied_out,
            "blocks_swapped_in": roster.memory.swap.copied_in,
            "blocks_free": pool.free,
            "blocks_used": pool.used,
            "blocks_cached": pool.cached,
            "blocks_fencing": pool.fencing,
            "prompt_tokens": roster.memory.prompt_tokens,
            "prompt_tokens_cached": roster.memory.cached_tokens,
        }
        counters |= self._rank.collectives()
        return counters | self._ranks.counters(self._rank.moved())

    def problems(self) -> list[str]:
        """Return what is beyond its budget, in words; none: healthy."""
        pool = self._scheduler.stats().roster.memory.pool
        budget = self.config.handover.fencing_budget
        if pool.fencing <= budget * pool.total:
            return []
        return [f"{pool.fencing} of {pool.total} blocks wait for a fence (budget {budget:.0%})"]

    def check(self, *, idle: bool) -> None:
        """Assert that the books balance and, if `idle`, that nobody holds a block.

        A step under way keeps the blocks that it writes, whoever has gone away meanwhile.
        """
        self._scheduler.check()
        if idle and not self.engine.in_step:
            pool = self._scheduler.stats().roster.memory.pool
            assert pool.used == pool.fencing == 0, f"blocks leaked: {pool}"
            self._rank.check_idle()

    def _engine_ended(self, task: "asyncio.Task[None]") -> None:
        """Die loudly if the engine loop dies: an instance without it would hang every request."""
        error = None if task.cancelled() else task.exception()
        if error is not None and not self._closing:
            loop = asyncio.get_running_loop()
            loop.call_exception_handler(
                {"message": "the engine loop crashed", "exception": InternalError(repr(error))}
            )
            os._exit(70)

    async def close(self) -> None:
        """End the engine after its steps, then all ranks. Safe to repeat."""
        if self._closing:
            return
        self._closing = True
        await self.engine.close()
        await self._running
        if self._paced is not None:
            self._paced.close()
        await self._ranks.close()
        await self._rank.close()


async def _load_all(
    config: WorkerConfig,
    ranks: RankGroup,
    facts: "_Facts",
    parts: RankParts,
    on_listening: OnListening,
) -> tuple[LoadedRank, tuple[bytes, ...], DirectReads]:
    """Wait for all ranks, and let each load its share; return the leader's, and how to read all."""
    listener, port = None, 0
    if config.parallel.size > 1:
        on_listening(ranks.leader)
        await ranks.join()
        parts.on_progress(f"all {config.parallel.size} ranks are here")
        listener = listen(config.host)
        port = listener.getsockname()[1]
    meeting = meeting_of(config, port)
    loaded, _ = await _side_by_side(
        load_share(config, meeting, listener, parts),
        ranks.call_all("load", port, meeting.library),
        _leave,
    )
    try:  # all together, since steps that are measured or captured wait for all ranks
        own_room, rooms = await _side_by_side(
            measured_room(config, loaded, parts), ranks.call_all("measure"), _nothing
        )
        room = common_room([own_room, *map(Room.unpack, rooms)])
    except BaseException:
        loaded.membership.leave()
        raise
    rank, others_told = await _side_by_side(
        start_rank(config, loaded, room, facts.incarnation, parts),
        ranks.call_all("start", room.pack()),
        LoadedRank.close,
    )
    own = rank.metadata()
    told = [metadata for metadata in (own, *others_told) if metadata[0]]
    direct = tuple(metadata[1] for metadata in told)
    ways = () if rank.direct is None else rank.direct.ways
    reads = DirectReads(direct, ways) if all(direct) else DirectReads((), ())
    return rank, tuple(metadata[0] for metadata in told), reads


async def _side_by_side(
    own: Coroutine[Any, Any, T],
    others: Coroutine[Any, Any, list[Any]],
    undo: Callable[[T], Awaitable[None]],
) -> tuple[T, list[Any]]:
    """Let this rank and all others do something; `undo` its own if one of the others fails."""
    asking = asyncio.create_task(others)
    try:
        done = await own
    except BaseException:
        asking.cancel()
        raise
    try:
        return done, await asking
    except BaseException:
        await undo(done)
        raise


async def _leave(loaded: RankModel) -> None:
    loaded.membership.leave()


async def _nothing(room: Room) -> None:
    pass


class _Facts:
    """What is drawn at start, and what is computed of the model."""

    def __init__(self) -> None:
        self.incarnation: Incarnation = new_incarnation()
        self.compatibility = ""
        self.load_s = 0.0
        self._started = time.monotonic()
        self._model_len = 0

    def learn(self, config: WorkerConfig, rank: LoadedRank) -> None:
        """Learn about the model; raises InvalidConfig for a length that it was not made for."""
        spec = rank.model.spec
        self.compatibility = compatibility_hash(
            model=config.model_name,
            revision=revision(config.model_dir),
            compute_dtype=config.engine.dtype,
            rope=spec.rope_digest(),
            layout=rank.layout.model,
        )
        wanted = config.engine.max_model_len
        if wanted is not None and wanted > spec.max_position:
            raise InvalidConfig(
                "max_model_len", wanted, f"up to {spec.max_position}, what the model was made for"
            )
        self._model_len = wanted or spec.max_position
        self.load_s = time.monotonic() - self._started

    def max_model_len(self, kv: KVCache) -> int:
        """Return the tokens that one sequence may have: model and pool must both have room."""
        return min(self._model_len, kv.num_blocks * kv.layout.block_size)
