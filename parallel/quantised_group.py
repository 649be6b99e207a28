"""All-reduce of large tensors as int8 blocks with scales, for links that bytes are dear on.

The two steps of an all-reduce, each in int8 (as in ZeRO++, Wang et al., 2023): every rank gets its
blocks from all others and adds them up in float32; then everyone gets the sums. A block of 128
numbers travels as 132 bytes: a quarter of float32's, half of bfloat16's.

Rounding to the nearest of 127 steps is off by at most half a step. So the sum of n ranks' numbers,
below 10³⁸, is off by at most (m₁ + … + mₙ + m) / 254: mᵢ is the largest magnitude that rank i has
in that block and m the largest of the sums that are rounded then; and by the rounding of float32
and of x's type besides.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from baton.parallel.group import Group
from baton.parallel.layered_group import LayeredGroup
from baton.parallel.passes import passes

BLOCK = 128
"""Numbers that share a scale."""

_PACKED = BLOCK + 4
_STEPS = 127
_LEAST = torch.finfo(torch.float32).tiny


class QuantisedGroup(LayeredGroup):
    """See Group; its all-reduce of floats from `from_bytes` on has the error above.

    Every rank, also the one that added a block up, takes the sum from the same int8: the same bits
    on all.
    """

    def __init__(self, below: Group, from_bytes: int) -> None:
        super().__init__(below)
        self._from_bytes = from_bytes

    def all_reduce_(self, x: Tensor) -> Tensor:
        """See Group; a number that is not finite makes its block so on all ranks."""
        if self._as_it_is(x):
            return self.below.all_reduce_(x)
        blocks = packed(x)
        more = blocks.shape[0] % self.size
        rows = [blocks.shape[0] // self.size + (i < more) for i in range(self.size)]
        parts = self.below.all_to_all(blocks, rows, [rows[self.rank]] * self.size)
        unpack(self.below.all_gather(self._added(parts), rows), x)
        return x

    def addends(self, x: Tensor) -> Sequence[Tensor]:
        """See Group."""
        return self.below.addends(x) if self._as_it_is(x) else (self.all_reduce_(x),)

    def _as_it_is(self, x: Tensor) -> bool:
        return x.nbytes < self._from_bytes or not x.is_floating_point()

    def _added(self, parts: Tensor) -> Tensor:
        """Return the packed sums of the packed blocks that lie rank by rank."""
        parts = parts.view(self.size, -1, _PACKED)
        sums = torch.empty_like(parts[0])
        for some in passes(sums.shape[0], BLOCK * 4, sums.device):
            total = _numbers(parts[0, some])
            for part in parts[1:]:
                total += _numbers(part[some])
            _pack(total, sums[some])
        return sums


def packed(x: Tensor) -> Tensor:
    """Return x as int8 [blocks, BLOCK + 4]: each block's numbers, then its float32 scale."""
    flat = x.view(-1)
    count = -(-flat.shape[0] // BLOCK)
    blocks = torch.empty(count, _PACKED, dtype=torch.int8, device=x.device)
    for some in passes(count, BLOCK * 4, x.device):
        numbers = flat[some.start * BLOCK : some.stop * BLOCK].float()
        padding = (some.stop - some.start) * BLOCK - numbers.shape[0]
        if padding:
            numbers = torch.nn.functional.pad(numbers, (0, padding))
        _pack(numbers.view(-1, BLOCK), blocks[some])
    return blocks


def unpack(blocks: Tensor, x: Tensor) -> None:
    """Write to x the numbers that `packed` made such blocks of."""
    flat = x.view(-1)
    for some in passes(blocks.shape[0], BLOCK * 4, x.device):
        part = flat[some.start * BLOCK : some.stop * BLOCK]
        part.copy_(_numbers(blocks[some]).view(-1)[: part.shape[0]])


def _pack(numbers: Tensor, blocks: Tensor) -> None:
    # The least scale is a float's least, for which a block of zeros stays one.
    scales = (numbers.abs().amax(1, keepdim=True) / _STEPS).clamp_min(_LEAST)
    # What is not finite is in the scale already, and 0 of it is no number again.
    steps = (numbers / scales).nan_to_num_(0.0).round_()
    blocks[:, :BLOCK] = steps.clamp_(-_STEPS, _STEPS)
    blocks[:, BLOCK:] = scales.view(torch.int8)


def _numbers(blocks: Tensor) -> Tensor:
    scales = blocks[:, BLOCK:].contiguous().view(torch.float32)
    return blocks[:, :BLOCK] * scales
