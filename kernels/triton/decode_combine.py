"""Puts together what the items of a row of decode attention have found."""

import triton
import triton.language as tl
from torch import Tensor

from baton.kernels.triton.decode_plan import DecodePlan
from baton.kernels.triton.numbers import LOG2E, power_of_2

_SPANS = 16  # read at a time


def combine(
    found: Tensor, weights: Tensor, plan: DecodePlan, sinks: Tensor | None, out: Tensor
) -> None:
    """Write out [rows, heads, head_dim] of rows that have several items; leave the others.

    `found` is [items, heads, head_dim] and `weights` [items, heads], both float32. `sinks` [heads]
    take their share here.
    """
    rows, heads, head_dim = out.shape
    _combine[(rows, heads)](
        found,
        weights,
        plan.firsts,
        sinks,
        out,
        heads,
        out.stride(0),
        out.stride(1),
        D=head_dim,
        BLOCK_D=power_of_2(head_dim),
        SPANS=_SPANS,
        LOG2E=LOG2E,
        num_warps=4,
    )


@triton.jit
def _combine(
    found,
    weights,
    firsts,
    sinks,
    out,
    heads,
    s_row,
    s_head,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPANS: tl.constexpr,
    LOG2E: tl.constexpr,
):
    row = tl.program_id(0)
    head = tl.program_id(1)
    first = tl.load(firsts + row)
    end = tl.load(firsts + row + 1)
    if end - first < 2:
        return
    d = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D], tl.float32)
    highest = -float("inf")
    total = 0.0
    if sinks is not None:
        highest = tl.load(sinks + head).to(tl.float32) * LOG2E
        total = 1.0
    for start in range(first, end, SPANS):
        item = start + tl.arange(0, SPANS)
        here = item < end
        weight = tl.load(weights + item * heads + head, mask=here, other=-float("inf"))
        place = (item * heads + head)[:, None] * D + d[None, :]
        value = tl.load(found + place, mask=here[:, None] & (d[None, :] < D), other=0.0)
        new = tl.maximum(highest, tl.max(weight, 0))
        share = tl.exp2(weight - new)
        kept = tl.exp2(highest - new)
        acc = acc * kept + tl.sum(value * share[:, None], 0)
        total = total * kept + tl.sum(share, 0)
        highest = new
    place = row.to(tl.int64) * s_row + head * s_head + d
    tl.store(out + place, (acc / total).to(out.dtype.element_ty), mask=d < D)
