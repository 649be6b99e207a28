"""Room on a GPU for a mesh whose steps the host leads: stages, experts at places, rings of context.

Such steps run on GPUs by the code that runs them on CPUs (executor/runner.py), over NCCL in place
of Gloo: kernel by kernel, and waited for.
"""

from collections.abc import Iterable
from functools import partial

from baton.core.config import WorkerConfig
from baton.core.ids import BlockId, SeqId
from baton.core.kv_layout import KVLayout
from baton.core.memory import MIB
from baton.core.request import SamplingParams
from baton.engine.step import ScheduledSequence, StepPlan
from baton.executor.gpu_memory import MemoryUse, told_if_it_does_not_fit
from baton.executor.gpu_start import (
    Gpu,
    Say,
    largest_prompts,
    latest_chunk,
    limits_of,
    most_decodes,
)
from baton.executor.kv_cache import KVCache
from baton.executor.room import Room
from baton.executor.runner import ModelRunner
from baton.models.decoder import Decoder
from baton.models.loader import Model

_PARAMS = SamplingParams(temperature=1.0, top_p=0.9)


def room_led_by_host(
    gpu: Gpu, config: WorkerConfig, model: Model, layout: KVLayout, staged: int, say: Say
) -> Room:
    """Return what the GPU has room for beside the model; raises InvalidConfig if that is no pool.

    All ranks of an instance call this, and compute the same steps together: the largest, at each
    place. `layout` is the rank's own, `staged` the bytes that handovers take for staging.
    """
    assert isinstance(model, Decoder), f"{model} does not run on a GPU"
    say("measuring what the largest steps take")
    engine, places = config.engine, config.parallel.places
    limits, loaded = limits_of(engine, model, depth=1), gpu.meter.used()
    allowed = "less: the largest step does not fit beside the weights"
    with told_if_it_does_not_fit("max_batch_tokens", engine.max_batch_tokens, allowed):
        blocks = limits.tokens // layout.block_size + limits.rows + 1
        runner = ModelRunner(model, KVCache(layout, blocks, str(model.device)))
        steps = (
            largest_prompts(limits, layout),
            latest_chunk(limits, layout),
            most_decodes(limits),
        )
        peaks = [
            gpu.meter.peak(partial(_run, runner, StepPlan(n, _at_all(places, blocks, sequences))))
            for n, sequences in enumerate(steps)
        ]
    use = MemoryUse(gpu.meter.total(), loaded, max(peaks), captured=0, staged=staged)
    found = use.blocks(engine, layout.block_bytes)
    say(f"GPU memory: {found * layout.block_bytes // MIB} MiB for the KV pool; {use}")
    return Room(found)


def _run(runner: ModelRunner, plan: StepPlan) -> None:
    runner.compute(plan)


def _at_all(
    places: int, blocks: int, sequences: Iterable[ScheduledSequence]
) -> tuple[ScheduledSequence, ...]:
    """Return the same sequences at every place, each of which has so many blocks."""
    few = tuple(sequences)
    return tuple(
        s._replace(
            seq_id=SeqId(place * len(few) + s.seq_id),
            blocks=tuple(BlockId(place * blocks + block) for block in s.blocks),
            sampling=_PARAMS,
            context=None,
        )
        for place in range(places)
        for s in few
    )
