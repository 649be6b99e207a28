"""Which experts a token visits, and in which order experts take their tokens; all on the device.

A slot is one visit: slot = token × top_k + rank. Experts compute tiles of slots:

    expert 0   | s s s s | s s · · |       slots of an expert in their order, -1 (·) fills its
    expert 3   | s s s · |                 last tile; experts without a visit have no tile

The number of tiles is bounded by the batch's size alone, so that a CUDA graph serves all routings;
tiles past the last one belong to expert -1. Positions come from counts, not from atomics: the same
routing gives the same order always.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from baton.kernels.routing import Routing
from baton.kernels.triton.numbers import ceil_div, power_of_2

_CHUNK = 1024  # slots looked at together


@dataclass(frozen=True, slots=True)
class ExpertOrder:
    """The tiles of one step."""

    slots: Tensor
    """[tiles * rows] int32; -1 where a tile is not full"""
    experts: Tensor
    """[tiles] int32; -1 past the last tile"""
    rows: int
    """Slots in a tile."""
    top_k: int


def route(
    logits: Tensor, routing: Routing, correction: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return experts [tokens, top_k] int32, best first, and weights float32 of the same shape.

    `logits` are [tokens, experts]; `correction` [experts] counts in the choice and not in the
    weights.
    """
    tokens, experts = logits.shape
    chosen = torch.empty(tokens, routing.top_k, dtype=torch.int32, device=logits.device)
    weights = torch.empty(tokens, routing.top_k, dtype=torch.float32, device=logits.device)
    assert routing.groups == 1 or power_of_2(experts) == experts, "groups of powers of 2 only"
    _route[(tokens,)](
        logits,
        correction,
        chosen,
        weights,
        routing.scale,
        logits.stride(0),
        EXPERTS=experts,
        BLOCK=power_of_2(experts),
        TOP_K=routing.top_k,
        GROUPS=routing.groups,
        TOP_GROUPS=routing.top_groups,
        SCORING=routing.scoring,
        NORMALISE=routing.normalise,
        num_warps=1 if experts <= 128 else 2,
    )
    return chosen, weights


def order_by_expert(chosen: Tensor, experts: int, rows: int) -> ExpertOrder:
    """Return tiles of `rows` slots for the experts chosen [tokens, top_k] int32.

    Slots of an expert under 0 or of `experts` and over belong to nobody: other ranks have theirs.
    """
    slots = chosen.numel()
    tiles = ceil_div(slots, rows) + min(slots, experts)
    counts = chosen.new_empty(experts)
    order = ExpertOrder(
        chosen.new_empty(tiles * rows), chosen.new_empty(tiles), rows, chosen.shape[1]
    )
    _count[(experts,)](chosen, counts, slots, CHUNK=_CHUNK, num_warps=4)
    _place[(experts,)](
        chosen,
        counts,
        order.slots,
        order.experts,
        slots,
        tiles,
        EXPERTS=experts,
        BLOCK=power_of_2(experts),
        ROWS=rows,
        CHUNK=_CHUNK,
        num_warps=4,
    )
    return order


@triton.jit
def _route(
    logits,
    correction,
    chosen,
    weights,
    scale,
    s_token,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
    TOP_K: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    SCORING: tl.constexpr,
    NORMALISE: tl.constexpr,
):
    token = tl.program_id(0)
    expert = tl.arange(0, BLOCK)
    at = logits + token.to(tl.int64) * s_token + expert
    logit = tl.load(at, mask=expert < EXPERTS, other=-float("inf")).to(tl.float32)
    if SCORING == "sigmoid":
        score = 1 / (1 + tl.exp(-logit))
    elif SCORING == "softmax":
        score = tl.exp(logit - tl.max(logit, 0))
        score = score / tl.sum(score, 0)
    else:
        score = logit
    choice = score
    if correction is not None:
        choice += tl.load(correction + expert, mask=expert < EXPERTS, other=0.0).to(tl.float32)
    choice = tl.where(expert < EXPERTS, choice, -float("inf"))
    if GROUPS > 1:
        grouped = tl.reshape(choice, [GROUPS, BLOCK // GROUPS])
        best, at_best = tl.max(grouped, 1, return_indices=True)
        quality = best
        if correction is not None:
            place = tl.arange(0, BLOCK // GROUPS)[None, :]
            others = tl.where(place == at_best[:, None], -float("inf"), grouped)
            quality = best + tl.max(others, 1)
        group = tl.arange(0, GROUPS)
        kept = tl.zeros([GROUPS], tl.int32)
        for _ in tl.static_range(TOP_GROUPS):
            _, winner = tl.max(quality, 0, return_indices=True)
            kept = tl.where(group == winner, 1, kept)
            quality = tl.where(group == winner, -float("inf"), quality)
        choice = tl.reshape(tl.where(kept[:, None] > 0, grouped, -float("inf")), [BLOCK])
    rank = tl.arange(0, tl.constexpr(triton.next_power_of_2(TOP_K)))
    winners = tl.zeros_like(rank)
    found = tl.full(rank.shape, -float("inf"), tl.float32)
    for i in tl.static_range(TOP_K):
        _, winner = tl.max(choice, 0, return_indices=True)
        own = tl.sum(tl.where(expert == winner, score, 0.0), 0)
        winners = tl.where(rank == i, winner, winners)
        found = tl.where(rank == i, own, found)
        choice = tl.where(expert == winner, -float("inf"), choice)
    if SCORING == "top_softmax":
        found = tl.exp(found - tl.max(found, 0))
        found = found / tl.sum(found, 0)
    elif NORMALISE:
        found = found / tl.sum(tl.where(rank < TOP_K, found, 0.0), 0)
    place = token * TOP_K + rank
    tl.store(chosen + place, winners, mask=rank < TOP_K)
    tl.store(weights + place, found * scale, mask=rank < TOP_K)


@triton.jit(do_not_specialize=["slots"])
def _count(chosen, counts, slots, CHUNK: tl.constexpr):
    expert = tl.program_id(0)
    seen = tl.zeros([CHUNK], tl.int32)
    for start in range(0, slots, CHUNK):
        slot = start + tl.arange(0, CHUNK)
        seen += (tl.load(chosen + slot, mask=slot < slots, other=-1) == expert).to(tl.int32)
    tl.store(counts + expert, tl.sum(seen, 0))


@triton.jit(do_not_specialize=["slots", "tiles"])
def _place(
    chosen,
    counts,
    sorted_slots,
    experts,
    slots,
    tiles,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    expert = tl.program_id(0)
    every = tl.arange(0, BLOCK)
    sizes = tl.cdiv(tl.load(counts + every, mask=every < EXPERTS, other=0), ROWS)
    first = tl.sum(tl.where(every < expert, sizes, 0), 0)
    count = tl.load(counts + expert)
    own = tl.cdiv(count, ROWS)
    taken = first * ROWS
    for start in range(0, slots, CHUNK):
        slot = start + tl.arange(0, CHUNK)
        mine = tl.load(chosen + slot, mask=slot < slots, other=-1) == expert
        place = taken + tl.cumsum(mine.to(tl.int32), 0) - 1
        tl.store(sorted_slots + place, slot, mask=mine)
        taken += tl.sum(mine.to(tl.int32), 0)
    rest = tl.arange(0, ROWS)
    tl.store(sorted_slots + taken + rest, -1, mask=taken + rest < (first + own) * ROWS)
    for tile in range(first, first + own):
        tl.store(experts + tile, expert)
    if expert == EXPERTS - 1:
        for tile in range(first + own, tiles):
            tl.store(experts + tile, -1)
