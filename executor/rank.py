"""What every rank of an instance has, the one that leads too: weights, KV pool, transport."""

import asyncio
import socket
from collections import Counter
from dataclasses import dataclass

from baton.core.config import EngineConfig, ParallelConfig, WorkerConfig
from baton.core.errors import InvalidConfig
from baton.core.ids import Incarnation
from baton.core.kv_layout import KVLayout
from baton.core.memory import MIB
from baton.core.sharded_layout import Rank, ShardedLayout
from baton.core.topology import Role
from baton.executor.compute_device import StepsUnderWay, compute_device, steps_under_way
from baton.executor.device import Device
from baton.executor.expert_balance import ExpertBalancer
from baton.executor.gpu_runner import GpuRunner
from baton.executor.gpu_start import Gpu, blocks_on_gpu, open_gpu, start_runner
from baton.executor.handover_memory import HandoverMemory
from baton.executor.handover_orders import HandoverTerms
from baton.executor.kv_cache import KVCache, blocks_that_fit, make_layout
from baton.executor.rank_group import Say, rank_name
from baton.executor.rank_handover import KVPlace, RankHandover
from baton.executor.runner import ModelRunner
from baton.kernels import add_rms_norm
from baton.kernels.kv_digest import is_native
from baton.kv_transfer.choose import OpenTransport, open_device_transport
from baton.kv_transfer.negotiated import NegotiatedTransport
from baton.kv_transfer.transport import Transport
from baton.models.decoder import Decoder
from baton.models.loader import Model, load_model
from baton.models.mesh_plan import check_mesh, plan_stages
from baton.models.share import Share
from baton.models.spec import ModelSpec, read_spec
from baton.models.weights import Checkpoint, torch_dtype
from baton.parallel.group import Ranks
from baton.parallel.join import Library, Meeting, Membership, join_mesh
from baton.parallel.mesh import Mesh


@dataclass(frozen=True, slots=True)
class RankParts:
    """What a rank is given by who starts it."""

    on_progress: Say
    open_transport: OpenTransport
    device: Device | None = None
    """Where the pool is to lie, if not in host memory."""
    gpu: Gpu | None = None
    """What computes, if not what the config says."""


@dataclass(frozen=True, slots=True)
class LoadedRank:
    """One rank, ready to compute its share of steps; made by `load_rank`, ended by `close`."""

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
    """Computes on a GPU, if the instance does; it is the only rank then."""

    @property
    def tells(self) -> bool:
        """Whether this rank tells the leader the result of a step, for its place along ep."""
        last = self.place.rank.pp == self.layout.pp - 1
        return last and self.place.rank.tp == 0 and not self.place.copy

    def runner(self) -> ModelRunner:
        """Return what computes this rank's share of steps on the CPU."""
        return ModelRunner(
            self.model, self.kv, self.host, depth=self.steps.depth, balancer=self.balancer
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


def mesh_of(parallel: ParallelConfig) -> Mesh:
    """Return the mesh of an instance."""
    return Mesh(pp=parallel.pp, ep=parallel.ep, cp=parallel.cp, tp=parallel.tp)


def meeting_of(config: WorkerConfig, port: int) -> Meeting:
    """Return where the ranks meet, given the port of the leader's listening socket."""
    mesh, limit = mesh_of(config.parallel), config.parallel.step_timeout_s
    host = config.host if config.leader is None else config.leader.host
    int8_kib = config.parallel.int8_reduce_kib
    int8_from = None if int8_kib is None else int8_kib << 10
    library: Library = "gloo" if compute_device(config).type == "cpu" else "nccl"
    return Meeting(mesh, host, port, library, limit, int8_from)


async def load_rank(
    config: WorkerConfig,
    meeting: Meeting,
    listener: socket.socket | None,
    incarnation: Incarnation,
    parts: RankParts,
) -> LoadedRank:
    """Meet the other ranks, load this one's share and open its transport.

    `listener` is the leader's, which is given away. Raises InvalidConfig for what is not right.
    """
    device = compute_device(config)
    gpu = parts.gpu or open_gpu(device)
    steps = steps_under_way(config, on_gpu=gpu is not None)
    spec = read_spec(config.model_dir, max_length=config.engine.max_model_len)
    check_mesh(spec, meeting.mesh)
    membership = Membership(None)
    if meeting.mesh.size > 1:
        membership = await asyncio.to_thread(join_mesh, meeting, config.rank, listener, device)
    try:
        layout, share = _layout(config, spec, membership.ranks)
        parts.on_progress(f"loading {config.model_name} from {config.model_dir}")
        model = await asyncio.to_thread(_load_model, config, share, str(device))
        parts.on_progress(f"executor: {model.executor}")
        num_blocks = await asyncio.to_thread(_pool_blocks, config, layout, model, gpu, parts)
        place = _place(membership.ranks, num_blocks)
        own = layout.shard(place.rank).layout
        memory, pool_device = None, parts.device or (gpu.pool if gpu else None)
        if config.role is not Role.MIXED:
            memory = HandoverMemory(config, own, num_blocks, pool_device)
        kv = KVCache(own, num_blocks, str(device)) if memory is None else memory.kv
        host = _host_pool(config, layout, kv)
        runner = None
        if gpu is not None:
            runner = await asyncio.to_thread(
                start_runner, gpu, config.engine, model, kv, host, steps.depth, parts.on_progress
            )
        transport = direct = None
        if memory is not None:
            transport = await _open_transport(config, memory, incarnation, parts)
            direct = await _open_direct(config, memory, incarnation, parts)
    except BaseException:
        membership.leave()
        raise
    pools, ways, balancer = (kv, host, memory), (transport, direct), _balancer(config, model)
    return LoadedRank(layout, place, model, *pools, *ways, membership, balancer, steps, runner)


def _pool_blocks(
    config: WorkerConfig, layout: ShardedLayout, model: Model, gpu: Gpu | None, parts: RankParts
) -> int:
    """Return how many blocks the pool gets."""
    if gpu is None:
        blocks = _blocks(layout, config.engine.kv_mib_on_host)
    else:
        blocks = blocks_on_gpu(gpu, config.engine, model, layout.model, parts.on_progress)
    parts.on_progress(f"KV pool: {blocks} blocks of {config.engine.block_size} tokens")
    return blocks


def _place(ranks: Ranks, num_blocks: int) -> KVPlace:
    rank = Rank(ranks.pp.rank, ranks.tp.rank)
    return KVPlace(rank, ranks.ep.rank, num_blocks, copy=ranks.cp.rank > 0)


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


def _layout(config: WorkerConfig, spec: ModelSpec, ranks: Ranks) -> tuple[ShardedLayout, Share]:
    """Return how KV lies on all ranks, and what of the model is computed on this one."""
    engine = config.engine
    whole = make_layout(spec, engine.block_size, engine.kv_dtype or engine.dtype)
    kv_bytes = engine.kv_mib_on_host * MIB * config.parallel.pp
    stages = plan_stages(spec, config.parallel.pp, dtype=engine.dtype, kv_bytes=kv_bytes)
    return ShardedLayout(whole, config.parallel.tp, stages), Share(ranks, stages)


def _load_model(config: WorkerConfig, share: Share, device: str) -> Model:
    model = load_model(
        config.model_dir,
        dtype=config.engine.dtype,
        threads=config.threads,
        max_length=config.engine.max_model_len,
        executor=executor_of(config.engine),
        share=share,
        device=device,
    )
    if isinstance(model, Decoder):
        add_rms_norm.is_native()  # now, lest the first step compiles it
    return model


def executor_of(config: EngineConfig) -> str:
    """Return who is to compute.

    Raises InvalidConfig if that cannot keep KV so, or cannot be batch invariant and must be.
    """
    executor = config.executor
    if config.kv_dtype not in (None, config.dtype):
        if executor == "native":
            allowed = f"{config.dtype} with the executor native"
            raise InvalidConfig("kv_dtype", config.kv_dtype, allowed)
        executor = "torch"
    if not config.batch_invariant:
        return executor
    if executor == "torch":
        raise InvalidConfig("batch_invariant", "true", "false with the executor torch")
    return "native"


def _host_pool(config: WorkerConfig, layout: ShardedLayout, kv: KVCache) -> KVCache | None:
    """Return the pool for preempted sequences, if the config wants one."""
    memory_mib = config.engine.host_memory_mib
    if memory_mib == 0:
        return None
    blocks = _blocks(layout, memory_mib, "host_memory_mib")
    return KVCache(kv.layout, blocks, pinned=kv.tensor.is_cuda)


def _blocks(layout: ShardedLayout, memory_mib: int, field: str = "kv_memory_mib") -> int:
    """Return the blocks of every rank's pool: those of the rank that has room for the fewest."""
    shards: set[KVLayout] = {layout.shard(rank).layout for rank in layout.ranks}
    return min(blocks_that_fit(shard, memory_mib, field) for shard in shards)
