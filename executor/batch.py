"""Turns a step plan into tensors: one ragged batch, decodes first, and what attention needs."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from baton.core.ids import SeqId
from baton.core.kv_layout import KVLayout
from baton.core.request import SamplingParams
from baton.engine.step import SamplingContext, ScheduledSequence, StepPlan
from baton.kernels.attention import TILE_ROWS, AttentionBatch, DecodeGroup, PromptChunk
from baton.kernels.attention_mask import additive, band_mask, beyond
from baton.kernels.kv_pool import run_index, slot_index
from baton.models.blocks.step import ModelInput

Ints = NDArray[np.int64]

# Decodes share a call while the longest has at most so many times the blocks of the shortest;
# below so many blocks, padding costs less than another call.
_LENGTH_RATIO = 2
_SHORT = 8


@dataclass(frozen=True, slots=True)
class SampledRow:
    """A row of logits, and what its next token is drawn with."""

    seq_id: SeqId
    position: int
    """Of the token to be drawn."""
    sampling: SamplingParams
    tokens: tuple[int, ...] = ()
    """The sequence's tokens just before that position, as many as this step computes."""
    context: SamplingContext | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """One step, ready to run."""

    model: ModelInput
    sampled: tuple[SampledRow, ...]
    """One per row of logits, in order."""
    fresh_blocks: Tensor
    """[n] int64: blocks whose first slot this step writes."""


def make_batch(
    plan: StepPlan,
    layout: KVLayout,
    device: str | torch.device = "cpu",
    *,
    windows: Collection[int | None] = (None,),
    dtype: torch.dtype = torch.float32,
) -> Batch:
    """Return the tensors of a plan for pools of `layout`, and for layers of each of `windows`.

    `dtype` is what attention is computed in.
    """
    to = _Mover(device, dtype)
    sequences = _ordered(plan.sequences)
    starts = np.cumsum([0, *(len(s.tokens) for s in sequences)])
    positions = np.concatenate([np.arange(s.start, s.end) for s in sequences])
    blocks = np.concatenate([_blocks_of_tokens(s, layout.block_size) for s in sequences])
    offsets = positions % layout.block_size
    slots = slot_index(
        to(blocks),
        to(offsets),
        layers=layout.layers,
        per_layer=layout.runs_per_layer,
        block_size=layout.block_size,
    )
    rows = [row for row, s in enumerate(sequences) if s.samples]
    model = ModelInput(
        tokens=to(np.concatenate([np.asarray(s.tokens) for s in sequences])),
        positions=to(positions),
        sampled=to(starts[1:][rows] - 1),
        attention={
            window: AttentionBatch(
                slots=slots,
                decodes=_decode_groups(sequences, window, layout, to),
                chunks=_chunks(sequences, starts.tolist(), window, layout, to),
            )
            for window in windows
        },
    )
    sampled = tuple(
        SampledRow(s.seq_id, s.end, s.sampling, s.tokens, s.context)
        for s in (sequences[row] for row in rows)
    )
    return Batch(model, sampled, fresh_blocks=to(blocks[offsets == 0]))


def _blocks_of_tokens(sequence: ScheduledSequence, block_size: int) -> Ints:
    """Return the block that each of the sequence's tokens in this step goes to."""
    first = sequence.start // block_size
    table = np.asarray(sequence.blocks[first:], dtype=np.int64)
    index: Ints = np.arange(sequence.start, sequence.end) // block_size - first
    return table[index]


class _Mover:
    """Brings whole numbers from numpy to the device."""

    def __init__(self, device: str | torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.dtype = dtype
        """What attention is computed in, and so what masks are of."""

    def __call__(self, values: Ints) -> Tensor:
        return torch.from_numpy(values.astype(np.int64, copy=False)).to(self.device)


def _ordered(sequences: Sequence[ScheduledSequence]) -> list[ScheduledSequence]:
    """Put decodes first, the longest at the front, then the chunks in the plan's order."""
    assert sequences, "an empty plan is not run"
    decodes = [s for s in sequences if len(s.tokens) == 1]
    chunks = [s for s in sequences if len(s.tokens) > 1]
    return sorted(decodes, key=lambda s: -s.end) + chunks


def _table(
    sequence: ScheduledSequence, window: int | None, layout: KVLayout
) -> tuple[int, tuple[int, ...]]:
    """Return the blocks that the sequence's new tokens see, and the place of their first token."""
    first = 0 if window is None else max(0, sequence.start + 1 - window) // layout.block_size
    return first * layout.block_size, sequence.blocks[first : layout.blocks_for(sequence.end)]


def _decode_groups(
    sequences: Sequence[ScheduledSequence], window: int | None, layout: KVLayout, to: _Mover
) -> tuple[DecodeGroup, ...]:
    """Cut the decodes, longest first, into groups of like length."""
    groups: list[DecodeGroup] = []
    decodes = [s for s in sequences if len(s.tokens) == 1]
    tables = [_table(s, window, layout) for s in decodes]
    widths = [len(blocks) for _, blocks in tables]
    start = 0
    while start < len(tables):
        width, end = _group_end(widths, start)
        padded = np.array([b + b[-1:] * (width - len(b)) for _, b in tables[start:end]])
        lengths = [s.end - first for s, (first, _) in zip(decodes, tables, strict=True)]
        slots = torch.arange(width * layout.block_size, device=to.device)
        distance = to(np.array(lengths[start:end]))[:, None] - 1 - slots
        groups.append(
            DecodeGroup(
                start=start,
                end=end,
                runs=run_index(to(padded), layout.layers, layout.runs_per_layer).flatten(),
                mask=additive(beyond(distance, window), to.dtype)[:, None, None, :],
            )
        )
        start = end
    return tuple(groups)


def _group_end(widths: Sequence[int], start: int) -> tuple[int, int]:
    """Return the widest table of the group that begins at `start`, and where the group ends.

    A window makes tables of almost one width: they need not fall from one to the next.
    """
    narrow = width = widths[start]
    end = start + 1
    while end < len(widths):
        narrow, wider = min(narrow, widths[end]), max(width, widths[end])
        if wider > _SHORT and narrow * _LENGTH_RATIO < wider:
            break
        width, end = wider, end + 1
    return width, end


def _chunks(
    sequences: Sequence[ScheduledSequence],
    starts: Sequence[int],
    window: int | None,
    layout: KVLayout,
    to: _Mover,
) -> tuple[PromptChunk, ...]:
    chunks = []
    for sequence, row in zip(sequences, starts, strict=False):
        if len(sequence.tokens) == 1:
            continue
        first, blocks = _table(sequence, window, layout)
        runs = run_index(to(np.array([blocks])), layout.layers, layout.runs_per_layer)
        chunks.append(
            PromptChunk(
                start=row,
                end=row + len(sequence.tokens),
                runs=runs.flatten(),
                first=first,
                length=sequence.end,
                window=window,
                mask=_chunk_mask(sequence, first, window, layout, to),
            )
        )
    return tuple(chunks)


def _chunk_mask(
    sequence: ScheduledSequence, first: int, window: int | None, layout: KVLayout, to: _Mover
) -> Tensor | None:
    """Return a mask as large as the largest tile of the chunk needs."""
    if sequence.start == 0 and (window is None or window >= sequence.end):
        return None
    rows = min(TILE_ROWS, len(sequence.tokens))
    keys = sequence.end - first
    if window is not None:
        keys = min(keys, rows + window - 1)
    return band_mask(rows, keys, window, dtype=to.dtype, device=to.device)
