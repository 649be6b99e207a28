"""MXFP4, the published format of GPT-OSS's experts (Open Compute Project, MX formats 1.0).

A row is in groups of 32 values of 4 bits, two to a byte, the earlier one in the lower bits; each
group has a scale that is a power of two, kept as a byte with a bias of 127.
"""

import torch
from torch import Tensor

GROUP = 32
"""Values of a row that share a scale."""

_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = torch.tensor([*_POSITIVE, *(-value for value in _POSITIVE)])


def dequantise(blocks: Tensor, scales: Tensor) -> Tensor:
    """Return float32 [.., groups × 32] of blocks [.., groups, 16] and scales [.., groups]."""
    low, high = blocks & 0x0F, blocks >> 4
    values = _VALUES.to(blocks.device)[torch.stack((low, high), dim=-1).flatten(-2).int()]
    return torch.ldexp(values, scales.int()[..., None] - 127).flatten(-2)
