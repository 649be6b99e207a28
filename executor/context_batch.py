"""Splits the long prompts of a step plan over the ranks along cp (models/blocks/ring.py).

Everything else of the plan every rank computes: decodes, and chunks that are not worth the ring. So
all pools along cp hold the same, and rank 0, which has each prompt's last segment, samples.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor

from baton.core.kv_layout import KVLayout
from baton.engine.step import ScheduledSequence, StepPlan
from baton.executor.batch import Batch, blocks_of_tokens, make_batch
from baton.kernels.kv_pool import run_index, slot_index
from baton.models.blocks.ring import Past, RingBatch, Segment
from baton.parallel.split import sizes

RING_FROM = 512
"""Tokens of a chunk from which on it is split; it must have 4 for each rank."""


@dataclass(frozen=True, slots=True)
class ContextPlace:
    """Where a rank is along cp, and which chunks are worth the ring."""

    rank: int
    size: int
    ring_from: int = RING_FROM


def make_context_batch(
    plan: StepPlan,
    layout: KVLayout,
    place: ContextPlace,
    device: str | torch.device = "cpu",
    *,
    windows: Collection[int | None] = (None,),
    dtype: torch.dtype = torch.float32,
) -> Batch:
    """Return a rank's tensors of a plan, as `make_batch` does for a rank that has no others.

    Only rank 0 has rows to sample.
    """
    least = max(place.ring_from, 4 * place.size)
    split = [s for s in plan.sequences if len(s.tokens) >= least]
    if place.rank:
        plan = replace(plan, sequences=tuple(s._replace(samples=False) for s in plan.sequences))
    if not split or place.size == 1:
        return make_batch(plan, layout, device, windows=windows, dtype=dtype)
    whole = [s for s in plan.sequences if len(s.tokens) < least]
    cut = [[_segments(s, rank, place.size) for s in split] for rank in range(place.size)]
    own = [segment for segments in cut[place.rank] for segment in segments]
    if place.rank:
        own = [s._replace(samples=False) for s in own]
    batch = make_batch(
        replace(plan, sequences=(*whole, *own)),
        layout,
        device,
        windows=windows,
        in_ring=len(own),
        dtype=dtype,
    )
    ring = RingBatch(
        start=sum(len(s.tokens) for s in whole),
        segments=tuple(_rows(segments) for segments in cut),
        slots=tuple(
            torch.cat([_slots(s, layout, device) for pair in segments for s in pair])
            for segments in cut
        ),
        past=tuple(_past(s, layout, device) for s in split),
    )
    tokens = {s.seq_id: s.tokens for s in plan.sequences}
    return Batch(
        replace(batch.model, ring=ring),
        tuple(replace(row, tokens=tokens[row.seq_id]) for row in batch.sampled),
        torch.tensor(_fresh(plan.sequences, layout), dtype=torch.int64, device=device),
    )


def _segments(sequence: ScheduledSequence, rank: int, size: int) -> list[ScheduledSequence]:
    """Return a rank's two segments of a chunk; the chunk's last one samples if the chunk does."""
    ends = [0, *accumulate(sizes(len(sequence.tokens), 2 * size))]
    cuts = list(pairwise(ends))
    return [
        sequence._replace(
            tokens=sequence.tokens[start:end],
            start=sequence.start + start,
            samples=sequence.samples and end == len(sequence.tokens),
        )
        for start, end in (cuts[rank], cuts[-1 - rank])
    ]


def _rows(segments: Sequence[Sequence[ScheduledSequence]]) -> tuple[Segment, ...]:
    """Return a rank's segments with their rows, prompt by prompt."""
    found: list[Segment] = []
    row = 0
    for prompt, pair in enumerate(segments):
        for s in pair:
            found.append(Segment(prompt, s.start, slice(row, row + len(s.tokens))))
            row += len(s.tokens)
    return tuple(found)


def _slots(sequence: ScheduledSequence, layout: KVLayout, device: str | torch.device) -> Tensor:
    offsets = np.arange(sequence.start, sequence.end) % layout.block_size
    return slot_index(
        torch.from_numpy(blocks_of_tokens(sequence, layout.block_size)).to(device),
        torch.from_numpy(offsets).to(device),
        layers=layout.layers,
        per_layer=layout.runs_per_layer,
        block_size=layout.block_size,
    )


def _past(sequence: ScheduledSequence, layout: KVLayout, device: str | torch.device) -> Past:
    blocks = sequence.blocks[: layout.blocks_for(sequence.start)]
    table = torch.tensor([blocks], dtype=torch.int64, device=device)
    return Past(run_index(table, layout.layers, layout.runs_per_layer)[0], sequence.start)


def _fresh(sequences: Sequence[ScheduledSequence], layout: KVLayout) -> list[int]:
    """Return the blocks whose first slot the step writes, on whichever rank its token is."""
    return [
        block
        for s in sequences
        for block in s.blocks[layout.blocks_for(s.start) : layout.blocks_for(s.end)]
    ]
