"""From a loaded model to an executor on a GPU: the pool's size is measured, steps are captured."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import TYPE_CHECKING

import torch

from baton.core.config import EngineConfig
from baton.core.ids import BlockId, SeqId
from baton.core.kv_layout import KVLayout
from baton.core.memory import MIB
from baton.core.request import SamplingParams
from baton.engine.step import SamplingContext, ScheduledSequence
from baton.executor.cuda_device import CudaDevice
from baton.executor.cuda_queue import CudaQueue
from baton.executor.device import Device
from baton.executor.gpu_memory import CudaMeter, MemoryMeter, MemoryUse, told_if_it_does_not_fit
from baton.executor.gpu_pass import GpuLimits, GpuPass
from baton.executor.gpu_pieces import piece_bytes
from baton.executor.gpu_queue import GpuQueue
from baton.executor.gpu_runner import GpuRunner
from baton.executor.kv_cache import KVCache
from baton.executor.room import Room
from baton.kernels.backend import Backend, choose_backend
from baton.models.decoder import Decoder
from baton.models.loader import Model

if TYPE_CHECKING:  # at run time only who has a grammar needs its library
    from baton.models.grammar import GrammarCompiler

Say = Callable[[str], None]

_PARAMS = SamplingParams(temperature=1.0, top_p=0.9, logprobs=0)
_CONTEXT = SamplingContext(0, (), None)


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU, as an instance uses it."""

    queue: GpuQueue
    meter: MemoryMeter
    pool: Device | None
    """Where the KV pool of an instance lies that takes part in handovers; None: in host memory."""
    captures: bool = True
    """Whether what computes there reads nothing on the host, so that it can be captured."""


def open_gpu(device: torch.device) -> Gpu | None:
    """Return what there is to a device; None for the CPU."""
    if device.type == "cpu":
        return None
    index = device.index or 0
    captures = choose_backend(device).backend is Backend.TRITON
    return Gpu(CudaQueue(index), CudaMeter(device), CudaDevice(index), captures)


def captured_sizes(gpu: Gpu, config: EngineConfig, model: Decoder) -> tuple[int, ...]:
    """Return the batch sizes for which steps of decodes are captured; none if they cannot be."""
    return graph_sizes(config) if gpu.captures and model.capturable else ()


def graph_sizes(config: EngineConfig) -> tuple[int, ...]:
    """Return the batch sizes that the config asks for, in rising order."""
    most = config.max_sequences
    if config.cuda_graph_sizes is not None:
        return tuple(sorted({min(size, most) for size in config.cuda_graph_sizes}))
    sizes = (1, 2, 4, *range(8, 256, 8), *range(256, most + 1, 32))
    return (*(size for size in sizes if size < most), most)


def captured_tokens(gpu: Gpu, config: EngineConfig, model: Decoder) -> tuple[int, ...]:
    """Return for how many tokens steps with chunks are captured; none if they cannot be."""
    return graph_tokens(config) if gpu.captures and model.capturable else ()


def graph_tokens(config: EngineConfig) -> tuple[int, ...]:
    """Return the numbers of tokens that the config asks for, in rising order.

    Below 256 or so a GPU reads the weights for longer than it computes: padding costs nothing.
    """
    most = config.max_batch_tokens
    if config.cuda_graph_tokens is not None:
        return tuple(sorted({min(tokens, most) for tokens in config.cuda_graph_tokens}))
    tokens = (64, 128, 192, *range(256, 1025, 128))
    return (*(n for n in tokens if n < most), *((most,) if most <= tokens[-1] else ()))


def limits_of(config: EngineConfig, model: Decoder, depth: int) -> GpuLimits:
    """Return the largest steps that the scheduler may plan for a model."""
    longest = config.max_model_len or model.spec.max_position
    return GpuLimits(
        rows=config.max_sequences,
        tokens=config.max_batch_tokens,
        blocks=-(-longest // config.block_size),
        depth=depth,
    )


def measured_use(gpu: Gpu, config: EngineConfig, model: Decoder, layout: KVLayout) -> MemoryUse:
    """Run the largest steps once, on a pool that is just large enough, and return what they took.

    Raises InvalidConfig if they do not fit.
    """
    limits = limits_of(config, model, depth=1)
    loaded = gpu.meter.used()
    allowed = "less: the largest step does not fit beside the weights"
    with told_if_it_does_not_fit("max_batch_tokens", config.max_batch_tokens, allowed):
        blocks = limits.tokens // layout.block_size + limits.rows + 1
        kv = KVCache(layout, blocks, str(gpu.queue.device))
        steps = GpuPass(model, kv, gpu.queue, limits)
        prompts = max(
            gpu.meter.peak(partial(_run, steps, sequences))
            for sequences in (largest_prompts(limits, layout), latest_chunk(limits, layout))
        )
        decodes = gpu.meter.peak(partial(_run, steps, most_decodes(limits)))
    captured = decodes if captured_sizes(gpu, config, model) else 0
    loaded += steps.option_bytes
    if tokens := captured_tokens(gpu, config, model):
        # What is captured shares its memory, but not with what is launched.
        captured = max(captured, prompts) + piece_bytes(model, max(tokens))
    return MemoryUse(gpu.meter.total(), loaded, max(prompts, decodes), captured)


def room_on_gpu(
    gpu: Gpu, config: EngineConfig, model: Model, layout: KVLayout, staged: int, say: Say
) -> Room:
    """Return what the GPU has room for beside the model; raises InvalidConfig if that is no pool.

    All ranks of an instance call this, and so compute the same steps; `layout` is the rank's own.
    `staged` are the bytes that handovers take of the GPU for staging.
    """
    assert isinstance(model, Decoder), f"{model} does not run on a GPU"
    say("measuring what the largest steps take")
    use = replace(measured_use(gpu, config, model, layout), staged=staged)
    blocks = use.blocks(config, layout.block_bytes)
    say(f"GPU memory: {blocks * layout.block_bytes // MIB} MiB for the KV pool; {use}")
    return Room(blocks, captured_sizes(gpu, config, model), captured_tokens(gpu, config, model))


def start_runner(
    gpu: Gpu,
    config: EngineConfig,
    model: Model,
    kv: KVCache,
    host: KVCache | None,
    depth: int,
    room: Room,
    say: Say,
    limit_s: float,
    compiler: "Callable[[], GrammarCompiler] | None" = None,
) -> GpuRunner:
    """Capture the steps that all ranks have `room` for, and return what runs plans.

    `limit_s` is how long a step may take that is waited for.

    All ranks of an instance are given the same sizes, and so capture the same collectives in the
    same order. Says how far it is, a line per size; raises InvalidConfig if they do not fit.
    """
    assert isinstance(model, Decoder), f"{model} does not run on a GPU"
    limits = limits_of(config, model, depth)
    steps = GpuPass(model, kv, gpu.queue, limits, skip_below=config.attention_skip_below)
    allowed = "fewer or smaller ones, or a lower gpu_memory_utilization"
    with told_if_it_does_not_fit("cuda_graph_tokens", room.tokens, allowed):
        told = _counted(say, "captured steps of up to {} tokens with prompts", len(room.tokens))
        steps.capture_pieces(room.tokens, told)
    with told_if_it_does_not_fit("cuda_graph_sizes", room.sizes, allowed):
        told = _counted(say, "captured the step of {} decodes", len(room.sizes))
        steps.capture(room.sizes, told)
    return GpuRunner(steps, gpu.queue, kv, host, depth=depth, limit_s=limit_s, compiler=compiler)


def _counted(say: Say, what: str, total: int) -> Callable[[int], None]:
    """Return what says `what` of each size that is done, and how many of all these are."""
    numbers = count(1)
    return lambda size: say(f"{what.format(size)} ({next(numbers)} of {total})")


def _run(steps: GpuPass, sequences: list[ScheduledSequence]) -> None:
    steps.launch(sequences).done.wait()


def largest_prompts(limits: GpuLimits, layout: KVLayout) -> list[ScheduledSequence]:
    """Return as many tokens as a step may have, of as few sequences as may have them."""
    longest = limits.blocks * layout.block_size
    sequences: list[ScheduledSequence] = []
    block = left = 0
    for number in range(limits.rows):
        left = limits.tokens - sum(len(s.tokens) for s in sequences)
        if not left:
            break
        count = min(left, longest)
        taken = layout.blocks_for(count)
        table = tuple(BlockId(b) for b in range(block, block + taken))
        block += taken
        sequences.append(
            ScheduledSequence(SeqId(number), (0,) * count, 0, table, True, _PARAMS, _CONTEXT)
        )
    return sequences


def latest_chunk(limits: GpuLimits, layout: KVLayout) -> list[ScheduledSequence]:
    """Return the end of the longest prompt: latent attention makes keys of all that is before it.

    All of its table is one block, which is as much to read; what is written there nobody reads.
    """
    longest = limits.blocks * layout.block_size
    count = min(limits.tokens, longest)
    table = (BlockId(0),) * limits.blocks
    tokens, start = (0,) * count, longest - count
    return [ScheduledSequence(SeqId(0), tokens, start, table, True, _PARAMS, _CONTEXT)]


def most_decodes(limits: GpuLimits) -> list[ScheduledSequence]:
    """Return as many sequences as a step may have, of one token each."""
    return [
        ScheduledSequence(SeqId(number), (0,), 0, (BlockId(number),), True, _PARAMS, _CONTEXT)
        for number in range(min(limits.rows, limits.tokens))
    ]
