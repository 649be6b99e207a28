"""A rank's way to its share of a model: it meets the others, loads, and measures what is left."""

import asyncio
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from baton.core.config import EngineConfig, ParallelConfig, WorkerConfig
from baton.core.errors import InvalidConfig
from baton.core.kv_layout import KVLayout
from baton.core.memory import MIB
from baton.core.sharded_layout import Rank, Shard, ShardedLayout
from baton.executor.compute_device import (
    StepsUnderWay,
    compute_device,
    current_device,
    led_by_host,
    steps_under_way,
)
from baton.executor.device import Device
from baton.executor.gpu_compile import Wanted, compile_ahead
from baton.executor.gpu_led import room_led_by_host
from baton.executor.gpu_start import Gpu, open_gpu, room_on_gpu
from baton.executor.handover_memory import staged_on_device
from baton.executor.kv_cache import blocks_that_fit, make_layout
from baton.executor.rank_group import Say
from baton.executor.room import Room
from baton.kernels import add_rms_norm
from baton.kernels.backend import choose_backend, use_backend
from baton.kv_transfer.choose import OpenTransport
from baton.models.decoder import Decoder
from baton.models.loader import Model, load_model
from baton.models.mesh_plan import check_mesh, plan_stages
from baton.models.share import Share
from baton.models.spec import ModelSpec, read_spec
from baton.parallel.group import Ranks
from baton.parallel.join import Library, Meeting, Membership, join_mesh
from baton.parallel.mesh import AXES, Mesh


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
class RankModel:
    """One rank that has met the others and has its share of the model, but no pool yet."""

    layout: ShardedLayout
    """Of the whole instance."""
    shard: Shard
    """What of it this rank has."""
    model: Model
    membership: Membership
    """Of the groups of ranks."""
    device: torch.device
    """What computes."""
    gpu: Gpu | None
    """The same, if it is no CPU."""
    steps: StepsUnderWay
    """How many there may be at once."""


def mesh_of(parallel: ParallelConfig) -> Mesh:
    """Return the mesh of an instance."""
    return Mesh(**{axis: getattr(parallel, axis) for axis in AXES})


def meeting_of(config: WorkerConfig, port: int) -> Meeting:
    """Return where the ranks meet, given the port of the leader's listening socket."""
    mesh, limit = mesh_of(config.parallel), config.parallel.step_timeout_s
    host = config.host if config.leader is None else config.leader.host
    int8_kib = config.parallel.int8_reduce_kib
    int8_from = None if int8_kib is None else int8_kib << 10
    library: Library = "gloo" if compute_device(config).type == "cpu" else "nccl"
    return Meeting(mesh, host, port, library, limit, int8_from)


def check_library(config: WorkerConfig, own: Meeting, leaders: str) -> None:
    """Raise InvalidConfig if a rank would compute on CPUs and its leader on GPUs, or vice versa."""
    if own.library != leaders:
        allowed = "what is found on all ranks' hosts, cpu or cuda: the leader found the other"
        raise InvalidConfig("device", config.engine.device, allowed)


async def load_share(
    config: WorkerConfig, meeting: Meeting, listener: socket.socket | None, parts: RankParts
) -> RankModel:
    """Meet the other ranks, and load this one's share.

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
        wanted = None
        graphs = gpu is not None and gpu.captures and not led_by_host(config.parallel)
        if graphs and device.type == "cuda":
            own = layout.shard(Rank(share.ranks.pp.rank, share.ranks.tp.rank)).layout
            wanted = Wanted(config.model_dir, spec, config.engine, share, own, steps.depth)
        model = await asyncio.to_thread(_load_model, config, share, device, wanted, parts)
        parts.on_progress(f"executor: {model.executor}")
        shard = layout.shard(Rank(share.ranks.pp.rank, share.ranks.tp.rank))
    except BaseException:
        membership.leave()
        raise
    return RankModel(layout, shard, model, membership, device, gpu, steps)


async def measured_room(config: WorkerConfig, loaded: RankModel, parts: RankParts) -> Room:
    """Return what there is room for beside the model; how much of that is used, all ranks agree on.

    On GPUs all ranks compute steps together for it. Raises InvalidConfig if there is too little.
    """
    if loaded.gpu is None:
        memory_mib = config.engine.kv_mib_on_host
        return Room(blocks_on_host(loaded.layout, memory_mib, "kv_memory_mib"))
    model, layout, gpu = loaded.model, loaded.shard.layout, loaded.gpu
    on_device = (parts.device or gpu.pool) is not None
    staged = staged_on_device(config, layout) if on_device else 0
    if led_by_host(config.parallel):
        return await asyncio.to_thread(
            room_led_by_host, gpu, config, model, layout, staged, parts.on_progress
        )
    return await asyncio.to_thread(
        room_on_gpu, gpu, config.engine, model, layout, staged, parts.on_progress
    )


def _layout(config: WorkerConfig, spec: ModelSpec, ranks: Ranks) -> tuple[ShardedLayout, Share]:
    """Return how KV lies on all ranks, and what of the model is computed on this one."""
    engine = config.engine
    whole = make_layout(spec, engine.block_size, engine.kv_dtype or engine.dtype)
    kv_bytes = engine.kv_mib_on_host * MIB * config.parallel.pp
    stages = plan_stages(spec, config.parallel.pp, dtype=engine.dtype, kv_bytes=kv_bytes)
    return ShardedLayout(whole, config.parallel.tp, stages), Share(ranks, stages)


def _load_model(
    config: WorkerConfig,
    share: Share,
    device: torch.device,
    wanted: Wanted | None,
    parts: RankParts,
) -> Model:
    """Load the rank's share; if kernels are `wanted`, they are compiled meanwhile."""
    with current_device(device), _compiled_beside(wanted, device, parts.on_progress):
        model = load_model(
            config.model_dir,
            dtype=config.engine.dtype,
            threads=config.threads,
            max_length=config.engine.max_model_len,
            executor=executor_of(config.engine),
            share=share,
            device=str(device),
        )
    if isinstance(model, Decoder):
        add_rms_norm.is_native()  # now, lest the first step compiles it
    return model


@contextmanager
def _compiled_beside(wanted: Wanted | None, device: torch.device, say: Say) -> Iterator[None]:
    if wanted is None:
        yield
        return
    use_backend(choose_backend(device).backend)

    def compile_there() -> None:
        with current_device(device):
            compile_ahead(wanted, say)

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="compile ahead") as thread:
        compiled = thread.submit(compile_there)
        yield
        compiled.result()


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


def blocks_on_host(layout: ShardedLayout, memory_mib: int, field: str) -> int:
    """Return the blocks of every rank's pool: those of the rank that has room for the fewest."""
    shards: set[KVLayout] = {layout.shard(rank).layout for rank in layout.ranks}
    return min(blocks_that_fit(shard, memory_mib, field) for shard in shards)
