"""What every rank of an instance has, the one that leads too: weights, KV pool, transport."""

import asyncio
from collections import Counter
from dataclasses import dataclass

from baton.core.config import WorkerConfig
from baton.core.ids import Incarnation
from baton.core.sharded_layout import Rank, ShardedLayout
from baton.core.topology import Role
from baton.executor.compute_device import StepsUnderWay, led_by_host
from baton.executor.expert_balance import ExpertBalancer
from baton.executor.gpu_runner import GpuRunner
from baton.executor.gpu_start import start_runner
from baton.executor.grammars import Grammars
from baton.executor.handover_memory import HandoverMemory
from baton.executor.handover_orders import HandoverTerms
from baton.executor.kv_cache import KVCache
from baton.executor.rank_group import rank_name
from baton.executor.rank_handover import KVPlace, RankHandover
from baton.executor.rank_model import RankModel, RankParts, blocks_on_host
from baton.executor.room import Room
from baton.executor.runner import ModelRunner
from baton.kernels.kv_digest import is_native
from baton.kv_transfer.choose import open_device_transport
from baton.kv_transfer.negotiated import NegotiatedTransport
from baton.kv_transfer.transport import Transport
from baton.models.decoder import Decoder
from baton.models.loader import Model
from baton.models.weights import Checkpoint, torch_dtype
from baton.parallel.group import Ranks
from baton.parallel.join import Membership


@dataclass(frozen=True, slots=True)
class LoadedRank:
    """One rank, ready to compute its share of steps; made by `start_rank`, ended by `close`."""

    layout: ShardedLayout
    """Of the whole instance."""
    place: KVPlace
    """Which of it this rank has."""
    model: Model
    kv: KVCache
    host: KVCache | None
    """Has the KV of preempted sequences, if the config wants it."""
    memory: HandoverMemory | None
    """What handovers read and write, the pool included; a mixed instance has none."""
    transport: Transport | None
    """Nor has it this."""
    direct: NegotiatedTransport | None
    """Reads pools on devices, if its own is on one and something here can."""
    membership: Membership
    """Of the groups of ranks."""
    balancer: ExpertBalancer | None
    """Moves experts, where there are several places for them."""
    steps: StepsUnderWay
    """How many there may be at once."""
    gpu: GpuRunner | None
    """Computes on a GPU, if the instance does and its host does not lead the steps."""
    grammars: Grammars
    """Those that requests ask for."""

    @property
    def chooses(self) -> bool:
        """Whether this rank, perhaps with others, chooses the next tokens: in the last stage."""
        return self.place.rank.pp == self.layout.pp - 1

    @property
    def tells(self) -> bool:
        """Whether this rank tells the leader the result of a step, for its place."""
        return self.chooses and self.place.rank.tp == 0 and not self.place.copy

    def runner(self) -> ModelRunner:
        """Return what computes this rank's share of steps where the host leads them."""
        return ModelRunner(
            self.model,
            self.kv,
            self.host,
            depth=self.steps.depth,
            balancer=self.balancer,
            compiler=self.grammars.compiler,
        )

    def collectives(self) -> dict[str, float | int | str]:
        """Return what this rank's groups have moved, as counters by axis and kind; and experts."""
        counters: dict[str, float | int | str] = {}
        for axis, traffic in self.membership.traffic.items():
            for kind, moved in traffic.stats().items():
                counters[f"{axis}_{kind}_calls"] = moved.calls
                counters[f"{axis}_{kind}_bytes"] = moved.bytes
                counters[f"{axis}_{kind}_s"] = moved.seconds
        if self.balancer is not None:
            counters["expert_moves"] = self.balancer.moves
        return counters

    def metadata(self) -> tuple[bytes, bytes]:
        """Return how others read its KV: as usual, and where it is on a device; empty if nobody.

        Of ranks that have the same, along cp, the first is read.
        """
        if self.transport is None or self.place.copy:
            return b"", b""
        return self.transport.metadata(), b"" if self.direct is None else self.direct.metadata()

    def moved(self) -> dict[str, int]:
        """Return what its transports have moved and its staging holds, as counters by name."""
        counters: Counter[str] = Counter()
        for transport in (self.transport, self.direct):
            if transport is None:
                continue
            stats = transport.stats()
            counters["transfers_open"] += stats.transfers_open
            counters["tickets_open"] += stats.tickets_open
            counters["peers"] += stats.peers
            counters["transfers_failed"] += stats.transfers_failed
            counters["transport_fallbacks"] += stats.fallbacks
            counters["reads_refused"] += stats.refused
            for name, count in stats.bytes_read.items():
                counters[f"bytes_read_{name}"] += count
        if self.memory is not None and self.memory.staging is not None:
            pages = self.memory.staging.pool.stats()
            counters["staging_pages"] = pages.total
            counters["staging_pages_free"] = pages.free
            counters["staging_waiting"] = pages.waiting
        return dict(counters)

    def handover(self, terms: HandoverTerms, config: WorkerConfig) -> RankHandover:
        """Return this rank's part of an attempt."""
        transport = self.direct if terms.direct else self.transport
        assert transport is not None, "a handover in a mixed instance, or in a way it has not"
        assert self.memory is not None, "a handover in a mixed instance"
        limit_s = config.handover.read_timeout_s
        return RankHandover(terms, self.place, transport, self.memory, limit_s)

    async def close(self) -> None:
        """Give back what is open, and check that nothing was held."""
        if self.gpu is not None:
            self.gpu.close()
        self.membership.leave()
        for transport in (self.transport, self.direct):
            if transport is not None:
                await transport.close()
                transport.check()
        if self.memory is not None:
            self.memory.close()

    def check_idle(self) -> None:
        """Assert that no handover holds anything here."""
        if self.memory is not None and self.memory.staging is not None:
            self.memory.staging.pool.check(idle=True)


async def start_rank(
    config: WorkerConfig, loaded: RankModel, room: Room, incarnation: Incarnation, parts: RankParts
) -> LoadedRank:
    """Make the pool that all ranks have room for, capture steps, and open the transport.

    Raises InvalidConfig for what is not right; the rank has then left its groups.
    """
    gpu, own, steps = loaded.gpu, loaded.shard.layout, loaded.steps
    try:
        parts.on_progress(f"KV pool: {room.blocks} blocks of {config.engine.block_size} tokens")
        place = _place(loaded.membership.ranks, room.blocks)
        memory, pool_device = None, parts.device or (gpu.pool if gpu else None)
        if config.role is not Role.MIXED:
            memory = HandoverMemory(config, own, room.blocks, pool_device)
        kv = KVCache(own, room.blocks, str(loaded.device)) if memory is None else memory.kv
        host = _host_pool(config, loaded.layout, kv)
        grammars = Grammars(config.model_dir, loaded.model.spec.vocab_size)
        runner = None
        if gpu is not None and not led_by_host(config.parallel):
            runner = await asyncio.to_thread(
                start_runner,
                gpu,
                config.engine,
                loaded.model,
                kv,
                host,
                steps.depth,
                room,
                parts.on_progress,
                config.parallel.step_timeout_s,
                grammars.compiler,
            )
        transport = direct = None
        if memory is not None:
            transport = await _open_transport(config, memory, incarnation, parts)
            direct = await _open_direct(config, memory, incarnation, parts)
    except BaseException:
        loaded.membership.leave()
        raise
    pools, ways, balancer = (kv, host, memory), (transport, direct), _balancer(config, loaded.model)
    return LoadedRank(
        loaded.layout,
        place,
        loaded.model,
        *pools,
        *ways,
        loaded.membership,
        balancer,
        steps,
        runner,
        grammars,
    )


def _place(ranks: Ranks, num_blocks: int) -> KVPlace:
    rank = Rank(ranks.pp.rank, ranks.tp.rank)
    return KVPlace(rank, ranks.place, num_blocks, copy=ranks.cp.rank > 0)


def _balancer(config: WorkerConfig, model: Model) -> ExpertBalancer | None:
    parallel = config.parallel
    if parallel.ep == 1 or not parallel.expert_balance_steps or not isinstance(model, Decoder):
        return None
    dtype = torch_dtype(config.engine.dtype)
    checkpoint = Checkpoint(config.model_dir, dtype, model.device)
    return ExpertBalancer(
        model, checkpoint, every=parallel.expert_balance_steps, spare=parallel.spare_experts
    )


async def _open_transport(
    config: WorkerConfig, memory: HandoverMemory, incarnation: Incarnation, parts: RankParts
) -> Transport:
    native = await asyncio.to_thread(is_native)  # now, lest the first handover compiles it
    parts.on_progress(f"KV digests: {'native code' if native else 'numpy, slowly'}")
    transport = await parts.open_transport(
        memory.region,
        config.handover,
        host=config.host,
        owner=rank_name(config.instance_id, config.rank),
        incarnation=incarnation,
    )
    parts.on_progress(f"transport: {transport!r}")
    return transport


async def _open_direct(
    config: WorkerConfig, memory: HandoverMemory, incarnation: Incarnation, parts: RankParts
) -> NegotiatedTransport | None:
    """Open what reads pools on devices; None if ours is on none, or nothing here can."""
    if memory.device_region is None:
        return None
    transport = await open_device_transport(
        memory.device_region,
        config.handover,
        host=config.host,
        owner=rank_name(config.instance_id, config.rank),
        incarnation=incarnation,
    )
    ways = "staging only" if transport is None else ", ".join(transport.ways)
    parts.on_progress(f"KV on devices: {ways}")
    return transport


def _host_pool(config: WorkerConfig, layout: ShardedLayout, kv: KVCache) -> KVCache | None:
    """Return the pool for preempted sequences, if the config wants one."""
    memory_mib = config.engine.host_memory_mib
    if memory_mib == 0:
        return None
    blocks = blocks_on_host(layout, memory_mib, "host_memory_mib")
    return KVCache(kv.layout, blocks, pinned=kv.tensor.is_cuda)
