"""Context parallelism: a long prompt's chunk over several ranks, by ring attention (Liu, 2023).

The chunk is cut into twice as many segments as there are ranks, and each rank computes one from
either end, so that all see about as many keys:

    segments    0 1 2 3      rank 0: 0 and 3      rank 1: 1 and 2

In every layer the new K and V go round: what a rank has goes on to the next rank, while it attends
to that itself, until everyone has seen everything. Each rank writes all that comes by to its pool,
so that every pool along cp holds what one rank alone would have written, and any of them can be
read for a handover or go on from here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from baton.kernels.attention import Workspace
from baton.kernels.attention_scores import Scoring
from baton.kernels.kv_pool import KVLayer, write_kv
from baton.kernels.online_softmax import OnlineAttention
from baton.parallel.group import Exchange, Group


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive tokens of one prompt that one rank computes in a step."""

    prompt: int
    """Which of the step's split prompts, from 0."""
    first: int
    """Position in the sequence of its first token."""
    rows: slice
    """Of the rank's ring rows."""


@dataclass(frozen=True, slots=True)
class Past:
    """What the pool has of a prompt from steps before."""

    runs: Tensor
    """[runs per layer, blocks] int64"""
    length: int
    """Tokens."""


@dataclass(frozen=True, slots=True)
class RingBatch:
    """The prompts that a step splits over the ranks along cp; the same on each but for `start`."""

    start: int
    """The first of this rank's rows that are in the ring; all after it are."""
    segments: tuple[tuple[Segment, ...], ...]
    """By rank, in the order of its rows."""
    slots: tuple[Tensor, ...]
    """By rank, where the KV of its ring rows goes in every pool."""
    past: tuple[Past, ...]
    """By prompt."""

    def rows(self, rank: int) -> int:
        """Return how many ring rows a rank has."""
        return sum(s.rows.stop - s.rows.start for s in self.segments[rank])


@dataclass(frozen=True, slots=True)
class Ring:
    """A step's ring as one rank takes part in it."""

    cp: Group
    batch: RingBatch
    workspace: Workspace

    def attend_(
        self,
        out: Tensor,
        q: Tensor,
        new: Tensor,
        layer: KVLayer,
        window: int | None,
        scoring: Scoring,
    ) -> None:
        """Fill the ring rows of out [tokens, heads × dims]; write the other ranks' KV to the pool.

        q is [tokens, heads, dims]; `new`, this rank's K and V [tokens, parts × kv_heads, dims], is
        in the pool already.
        """
        ring, rank, size = self.batch, self.cp.rank, self.cp.size
        q, dims = q[ring.start :], q.shape[-1]
        # Rounded as they are in the pool: who reads them there sees the same.
        part = new[ring.start :].reshape(q.shape[0], layer.parts, -1, dims).to(layer.slots.dtype)
        own = [
            (segment, OnlineAttention(q[segment.rows], segment.first, window, scoring))
            for segment in ring.segments[rank]
        ]
        for hop in range(size):
            source = (rank - hop) % size
            more = hop + 1 < size
            coming = self._pass_on(part, (source - 1) % size) if more else None
            if hop:
                write_kv(layer, ring.slots[source], part)
            else:
                for segment, rows in own:
                    self._see_past(rows, segment, layer, window, dims)
            _see(own, part, ring.segments[source])
            if coming is not None:
                part = coming.wait()
        filled = out[ring.start :].view(q.shape)
        for segment, rows in own:
            filled[segment.rows] = rows.result()

    def _see_past(
        self,
        rows: OnlineAttention,
        segment: Segment,
        layer: KVLayer,
        window: int | None,
        dims: int,
    ) -> None:
        past = self.batch.past[segment.prompt]
        block_size = layer.runs.shape[1] // dims
        skipped = 0 if window is None else max(0, segment.first + 1 - window) // block_size
        first = skipped * block_size
        if first >= past.length:
            return
        runs = past.runs[:, skipped:].flatten()
        gathered = self.workspace.take(layer.runs, runs.shape[0])
        torch.index_select(layer.runs, 0, runs, out=gathered)
        length = (past.runs.shape[1] - skipped) * block_size
        kv = gathered.view(layer.parts, -1, length, dims)[:, :, : past.length - first]
        rows.add(kv[0], kv[-1], first)

    def _pass_on(self, part: Tensor, source: int) -> Exchange:
        """Begin to give the part to the next rank, and to take that of `source` from the last.

        Both in one, and not as a send and a receive: NCCL would not begin the receive before the
        peer has taken what is sent, and so on round the ring.
        """
        cp = self.cp
        sent, received = [0] * cp.size, [0] * cp.size
        sent[(cp.rank + 1) % cp.size] = part.shape[0]
        received[(cp.rank - 1) % cp.size] = self.batch.rows(source)
        return cp.start_all_to_all(part.contiguous(), sent, received)


def _see(
    own: Sequence[tuple[Segment, OnlineAttention]], part: Tensor, segments: Sequence[Segment]
) -> None:
    """Show a rank's K and V [rows, parts, kv_heads, dims] to the segments of the same prompts."""
    for segment, rows in own:
        for other in segments:
            if other.prompt == segment.prompt:
                k, v = (part[other.rows, i].transpose(0, 1) for i in (0, -1))
                rows.add(k, v, other.first)
