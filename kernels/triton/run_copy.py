"""Copies runs of bytes between any two places of a device's memory, mapped memory of peers too.

A handover reads parts of many blocks, often short: of 32 KiB, or of some heads of a layer. One
launch moves all of them straight from the peer's pool into one's own, with no stretch of memory in
between and no call for each.
"""

import triton
import triton.language as tl
from torch import Tensor

from baton.kernels.triton.numbers import ceil_div

_BLOCK = 2048  # words that a program copies


def copy_runs(table: Tensor, longest: int, *, grain: int) -> None:
    """Copy, for each row (target, source, length) of `table` [runs, 3] int64, so many bytes.

    Addresses are absolute. Runs have `longest` bytes at most and do not overlap; addresses and
    lengths are multiples of `grain`: 16, 4 or 1.
    """
    assert grain in (1, 4, 16)
    word = min(grain, 4)
    _copy_runs[(len(table), ceil_div(longest // word, _BLOCK))](
        table, WORD=word, ALIGNED=grain == 16, BLOCK=_BLOCK, num_warps=4
    )


@triton.jit
def _copy_runs(table, WORD: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    row = table + tl.program_id(0).to(tl.int64) * 3
    target = tl.load(row)
    source = tl.load(row + 1)
    words = tl.load(row + 2) // WORD
    first = tl.program_id(1).to(tl.int64) * BLOCK
    if first >= words:
        return
    at = first + tl.arange(0, BLOCK)
    if WORD == 4:
        come = source.to(tl.pointer_type(tl.int32))
        go = target.to(tl.pointer_type(tl.int32))
    else:
        come = source.to(tl.pointer_type(tl.int8))
        go = target.to(tl.pointer_type(tl.int8))
    if ALIGNED:  # four words at a time
        come = tl.multiple_of(come, 16)
        go = tl.multiple_of(go, 16)
        words = tl.multiple_of(words, 4)
    there = at < words
    tl.store(go + at, tl.load(come + at, mask=there), mask=there)
