"""All-reduce of large tensors as int8 blocks with scales, for links that bytes are dear on.

The two steps of a all-reduce, each in int8 (as in ZeRO++, Wang et al., 2023): every rank
gets its blocks from all others and adds them up in float32; then everyone gets the sums. A block of
128 numbers travels as 132 bytes: a quarter of float32's, half of bfloat16's.

Rounding to the nearest of 127 steps is off by at most half a step, so the sum of n ranks' x is off,
in every number, by at most (m₁ + … + mₙ + m) / 254, where m_i is the largest magnitude that rank i
has in that block and m the largest of the block's sum; and by the rounding of float32
and of x's type besides.
"""

import torch
from torch import Tensor

from baton.parallel.group import Group
from baton.parallel.layered_group import LayeredGroup

BLOCK = 128
"""Numbers that share a scale."""

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
        if x.nbytes < self._from_bytes or not x.is_floating_point():
            return self.below.all_reduce_(x)
        blocks = quantised(x)
        more = range(blocks.shape[0] % self.size)
        rows = [blocks.shape[0] // self.size + (i in more) for i in range(self.size)]
        own = rows[self.rank]
        parts = self.below.all_to_all(blocks, rows, [own] * self.size)
        total = numbers(parts).view(self.size, own, BLOCK).sum(0)
        sums = self.below.all_gather(quantised(total), rows)
        return x.copy_(numbers(sums).flatten()[: x.numel()].view(x.shape))


def quantised(x: Tensor) -> Tensor:
    """Return x as int8 [blocks, BLOCK + 4]: each block's numbers, then its float32 scale."""
    count = -(-x.numel() // BLOCK)
    padded = x.new_zeros(count * BLOCK, dtype=torch.float32)
    padded[: x.numel()] = x.flatten()
    blocks = padded.view(count, BLOCK)
    # The least scale is a float's least, for which a block of zeros stays one.
    scales = (blocks.abs().amax(1, keepdim=True) / _STEPS).clamp_min(_LEAST)
    packed = torch.empty(count, BLOCK + 4, dtype=torch.int8, device=x.device)
    packed[:, :BLOCK] = (blocks / scales).nan_to_num(0.0).round().clamp(-_STEPS, _STEPS)
    packed[:, BLOCK:] = scales.view(torch.int8)
    return packed


def numbers(packed: Tensor) -> Tensor:
    """Return the float32 numbers [blocks, BLOCK] of what `quantised` made."""
    scales = packed[:, BLOCK:].contiguous().view(torch.float32)
    return packed[:, :BLOCK] * scales
