"""A kernel that reads memory and does next to nothing else: the ceiling of all that decode does."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 8192
_PROGRAMS = 132 * 8


def read_all(memory: Tensor, maxima: Tensor) -> None:
    """Read flat int32 memory in whole blocks of 8192; leave each program's maximum in `maxima`."""
    assert memory.numel() % _BLOCK == 0
    _read[(len(maxima),)](memory, maxima, memory.numel() // _BLOCK, BLOCK=_BLOCK, num_warps=8)


def maxima_of(memory: Tensor) -> Tensor:
    """Return room for the maxima of as many programs as keep a GPU busy, or as have a block."""
    programs = min(_PROGRAMS, memory.numel() // _BLOCK)
    return torch.empty(programs, dtype=torch.int32, device=memory.device)


@triton.jit  # type: ignore[untyped-decorator]
def _read(memory, maxima, blocks, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    program, programs = tl.program_id(0), tl.num_programs(0)
    at = memory + program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    highest = tl.full([BLOCK], -(2**31), tl.int32)
    for _ in range(program, blocks, programs):
        highest = tl.maximum(highest, tl.load(at))
        at += programs * BLOCK
    tl.store(maxima + program, tl.max(highest, 0))
