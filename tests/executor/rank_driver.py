"""Plays an instance on every rank of a mesh: prompts in chunks, then tokens one by one.

It imports no test library: the ranks' processes run it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from baton.core.ids import BlockId, SeqId
from baton.core.request import SamplingParams
from baton.core.sharded_layout import Shard
from baton.engine.step import ScheduledSequence, StepPlan
from baton.executor.context_batch import ContextPlace, make_context_batch
from baton.executor.kv_cache import KVCache
from baton.executor.sharded_sampler import ShardedSampler
from baton.kernels.attention import Workspace
from baton.models.decoder import Decoder
from baton.models.loader import load_model
from baton.models.mesh_plan import plan_stages
from baton.models.share import Share
from baton.models.spec import read_spec
from baton.models.weights import Checkpoint
from baton.parallel.counted_group import Moved
from baton.parallel.expert_placement import Placement, balanced_placement
from baton.parallel.group import Ranks
from baton.parallel.mesh import AXES, Axis, Place

GREEDY = SamplingParams(temperature=0.0)
BLOCK_SIZE = 8
BLOCKS_EACH = 24


@dataclass(frozen=True)
class Job:
    """What all ranks do together."""

    folder: Path
    prompts: tuple[tuple[int, ...], ...]
    output: int
    """Tokens to generate."""
    chunk: int = 40
    scatter_from: int = 16
    ring_from: int = 16
    placement: Placement | None = None
    """Of the experts of every layer."""
    idle: int = 0
    """Steps at the end in which nobody has tokens."""
    rebalanced: int = 0
    """Experts at a place; if not 0, all runs twice, with the experts placed anew in between."""


@dataclass
class Outcome:
    """What one rank has at the end."""

    tokens: dict[int, list[int]]
    """By prompt; of the prompts of the rank's place along dp and ep."""
    logits: dict[int, NDArray[np.float32]]
    """By prompt [output, vocabulary]; empty on ranks that have none."""
    kv: NDArray[np.float32]
    shard: Shard
    loads: dict[int, list[int]] = field(default_factory=dict)
    """By layer, how often each expert was chosen."""


def run(ranks: Ranks, place: Place, job: Job) -> Outcome:
    """Return what this rank has after all prompts and their outputs."""
    return _Rank(ranks, job).run()


def run_counted(
    ranks: Ranks, place: Place, job: Job
) -> tuple[Outcome, dict[Axis, dict[str, Moved]]]:
    """Return what `run` does, and what each of the rank's groups has moved."""
    groups = {axis: group for axis in AXES if (group := getattr(ranks, axis)).size > 1}
    outcome = _Rank(ranks, job).run()
    return outcome, {axis: group.traffic.stats() for axis, group in groups.items()}


class _Rank:
    def __init__(self, ranks: Ranks, job: Job) -> None:
        spec = read_spec(job.folder)
        stages = plan_stages(spec, ranks.pp.size, dtype="float32", kv_bytes=1 << 20)
        placements = (job.placement,) * spec.layers if job.placement else ()
        self._share = Share(ranks, stages, placements, job.scatter_from)
        model = load_model(job.folder, executor="torch", share=self._share)
        assert isinstance(model, Decoder)
        self._model = model
        self._job = job
        self._shard = self._share.kv(spec, BLOCK_SIZE, "float32")
        self._kv = KVCache(self._shard.layout, BLOCKS_EACH * len(job.prompts))
        self._kv.tensor.fill_(float("nan"))
        self._sampler = ShardedSampler(ranks.tp, spec.vocab_size)
        self._workspace = Workspace()
        self._begin()

    def _begin(self) -> None:
        ranks, prompts = self._share.ranks, self._job.prompts
        mine = range(ranks.place, len(prompts), ranks.places)
        self._texts = {i: list(prompts[i]) for i in mine}
        self._computed = dict.fromkeys(mine, 0)
        self._logits: dict[int, list[NDArray[np.float32]]] = {i: [] for i in mine}

    def _rebalance(self) -> None:
        ep, each = self._share.ranks.ep, self._job.rebalanced
        loads = {i: ep.all_reduce_(n.clone()) for i, n in self._model.expert_loads.items()}
        placements = {i: balanced_placement(n.tolist(), ep.size, each) for i, n in loads.items()}
        self._model.place_experts(placements, Checkpoint(self._job.folder, torch.float32))

    @torch.inference_mode()
    def run(self) -> Outcome:
        self._run()
        if self._job.rebalanced:
            self._rebalance()
            self._begin()
            self._run()
        loads = {layer: found.tolist() for layer, found in self._model.expert_loads.items()}
        tokens = {i: t[len(self._job.prompts[i]) :] for i, t in self._texts.items()}
        logits = {i: np.stack(rows) for i, rows in self._logits.items() if rows}
        return Outcome(tokens, logits, self._kv.tensor.numpy(), self._shard, loads)

    def _run(self) -> None:
        longest = max(len(prompt) for prompt in self._job.prompts)
        steps = -(-longest // self._job.chunk) + self._job.output - 1 + self._job.idle
        for number in range(steps):
            plan = StepPlan(number, tuple(self._parts()))
            if plan.sequences:
                self._step(plan)
            else:
                self._model.join()

    def _parts(self) -> list[ScheduledSequence]:
        parts = []
        for i, text in self._texts.items():
            start = self._computed[i]
            if len(text) == len(self._job.prompts[i]) + self._job.output:
                continue
            tokens = tuple(text[start : start + self._job.chunk])
            samples = start + len(tokens) == len(text)
            blocks = tuple(BlockId(i * BLOCKS_EACH + b) for b in range(BLOCKS_EACH))
            parts.append(ScheduledSequence(SeqId(i), tokens, start, blocks, samples, GREEDY))
        return parts

    def _step(self, plan: StepPlan) -> None:
        ranks, model = self._share.ranks, self._model
        place = ContextPlace(ranks.cp.rank, ranks.cp.size, self._job.ring_from)
        windows = model.spec.windows
        batch = make_context_batch(plan, self._shard.layout, place, windows=windows)
        self._kv.tensor.index_fill_(0, batch.fresh_blocks, 0)
        stream = None
        if not self._share.first:
            stream = torch.empty(model.stream_shape(len(batch.model.tokens)))
            ranks.pp.receive_(stream, ranks.pp.rank - 1)
        found = model.forward(batch.model, self._kv.layers, self._workspace, stream=stream)
        if not self._share.last:
            ranks.pp.send(found.contiguous(), ranks.pp.rank + 1)
        sampling = [s.seq_id for s in plan.sequences if s.samples]
        tokens = torch.zeros(len(sampling), dtype=torch.int64)
        if self._share.last and not place.rank and sampling:
            order = [row.seq_id for row in batch.sampled]
            for seq_id, row in zip(order, self._sampler._whole(found), strict=True):
                self._logits[seq_id].append(row.numpy().copy())
            chosen = dict(zip(order, self._sampler.step(found, batch.sampled)[0], strict=True))
            tokens = torch.tensor([chosen[seq_id] for seq_id in sampling])
        if sampling:
            ranks.cp.broadcast_(tokens, 0)
            ranks.pp.broadcast_(tokens, ranks.pp.size - 1)
        for seq_id, token in zip(sampling, tokens.tolist(), strict=True):
            self._texts[seq_id].append(token)
        for part in plan.sequences:
            self._computed[part.seq_id] = part.end


def alone(job: Job) -> Outcome:
    """Return what one rank has that computes everything."""
    return run(Ranks(), Place(), job)


def prompts_of(lengths: Sequence[int], vocabulary: int) -> tuple[tuple[int, ...], ...]:
    """Return prompts of given lengths, of tokens of the whole vocabulary."""
    random = torch.Generator().manual_seed(5)
    return tuple(
        tuple(torch.randint(vocabulary, (length,), generator=random).tolist()) for length in lengths
    )
