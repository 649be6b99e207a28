"""Which program of decode attention takes which part of which sequence, decided on the device.

Sequences of a batch differ in length, and a batch may be smaller than the GPU. So all the keys of
the batch are cut into spans of about equal length, as many as keep the GPU busy:

    row 0   |=======|=======|===|        items 0, 1, 2
    row 1   |====|                       item  3
    row 2   |=======|=====|              items 4, 5

A row has one item at least. The number of programs is fixed by the batch's size alone, so that a
CUDA graph serves all lengths; those without an item end at once. One plan serves all layers of one
window. The idea is FlashInfer's (Ye et al., 2025), whose plan is made on the host.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from baton.kernels.triton.numbers import PROCESSORS, ceil_div, power_of_2

TILE = 64
"""Spans are whole tiles of this many tokens, and begin at a multiple of it."""
_LEAST_TILES = 2  # of a span: below, combining costs more than it gains
_PROGRAMS = 4 * PROCESSORS
_ITEMS = 16  # that one program of the planner finds the rows of


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """The items of one step; `programs` is how many programs each of them has."""

    lengths: Tensor
    """[rows] int32: tokens of each sequence, the new one included; 0 in rows that are padding."""
    window: int | None
    """Tokens that a row sees at most, its own included."""
    items: Tensor
    """[items, 2] int32: row and which of its spans; -1 past the last item."""
    firsts: Tensor
    """[rows + 1] int32: each row's first item, then the number of items."""
    span: Tensor
    """[1] int32: tokens in a span."""
    programs: int


def plan_decode(lengths: Tensor, programs: int, window: int | None = None) -> DecodePlan:
    """Return the plan for lengths [rows] int32, for a kernel of `programs` programs an item.

    Nothing is read on the host; the tensors' sizes depend on the number of rows only.
    """
    rows = lengths.shape[0]
    count = rows + _PROGRAMS // programs
    items = lengths.new_empty(count, 2)
    firsts = lengths.new_empty(rows + 1)
    span = lengths.new_empty(1)
    _plan[(ceil_div(count, _ITEMS),)](
        lengths,
        items,
        firsts,
        span,
        rows,
        count,
        programs,
        0 if window is None else window,
        TARGET=_PROGRAMS,
        TILE=TILE,
        LEAST=_LEAST_TILES,
        ROWS=power_of_2(rows),
        ITEMS=_ITEMS,
        num_warps=4,
    )
    return DecodePlan(lengths, window, items, firsts, span, programs)


def partials(plan: DecodePlan, heads: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Return room for what the items find: sums [items, heads, head_dim], log2 of their weight."""
    items = plan.items.shape[0]
    device = plan.items.device
    found = torch.empty(items, heads, head_dim, dtype=torch.float32, device=device)
    return found, torch.empty(items, heads, dtype=torch.float32, device=device)


@triton.jit(do_not_specialize=["rows", "count", "programs", "window"])
def _plan(
    lengths,
    items,
    firsts,
    span,
    rows,
    count,
    programs,
    window,
    TARGET: tl.constexpr,
    TILE: tl.constexpr,
    LEAST: tl.constexpr,
    ROWS: tl.constexpr,
    ITEMS: tl.constexpr,
):
    row = tl.arange(0, ROWS)
    length = tl.load(lengths + row, mask=row < rows, other=0)
    hidden = tl.where(window > 0, tl.maximum(length - window, 0), 0)
    tiles = tl.cdiv(length, TILE) - hidden // TILE
    per_span = tl.maximum(tl.cdiv(tl.sum(tiles, 0) * programs, TARGET), LEAST)
    spans = tl.where(row < rows, tl.maximum(tl.cdiv(tiles, per_span), 1), 0)
    ends = tl.cumsum(spans, 0)
    first = ends - spans
    item = tl.program_id(0) * ITEMS + tl.arange(0, ITEMS)
    owner = tl.sum((ends[None, :] <= item[:, None]).to(tl.int32), 1)
    own_first = tl.sum(tl.where(row[None, :] == owner[:, None], first[None, :], 0), 1)
    used = item < tl.sum(spans, 0)
    tl.store(items + 2 * item, tl.where(used, owner, -1), mask=item < count)
    tl.store(items + 2 * item + 1, tl.where(used, item - own_first, -1), mask=item < count)
    if tl.program_id(0) == 0:
        tl.store(firsts + row, first, mask=row < rows)
        tl.store(firsts + rows, tl.sum(spans, 0))
        tl.store(span, per_span * TILE)


@triton.jit
def item_bounds(items, lengths, span, window, item, TILE: tl.constexpr):
    """Return an item's row, its first and last + 1 token, and the row's first token in sight."""
    row = tl.load(items + 2 * item)
    part = tl.load(items + 2 * item + 1)
    length = tl.load(lengths + tl.maximum(row, 0))
    tokens = tl.load(span)
    low = tl.where(window > 0, tl.maximum(length - window, 0), 0)
    begin = low // TILE * TILE + part * tokens
    return row, begin, tl.minimum(begin + tokens, length), low
