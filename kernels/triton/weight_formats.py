"""Weights in 8 and 4 bits, as skinny_linear.py and grouped_linear.py read them.

    float8, int8   [out, in], a scale per output                    w = stored × scale
    int4           bytes [out, in / 2], a scale per output and      w = (nibble - 8) × scale
                   group of 128 inputs

A group of 128 inputs is 64 bytes; byte j holds input j in its lower half and input 64 + j in the
upper one, so that either half of all bytes is a run of inputs, and nothing is interleaved again
after it is read.
"""

import torch
from torch import Tensor

GROUP = 128


def quantise_float8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return float8_e4m3fn weights [.., out, in] and scales [.., out] float32."""
    scales = weight.float().abs().amax(-1).clamp_(min=1e-12) / 448
    return (weight.float() / scales[..., None]).to(torch.float8_e4m3fn), scales


def quantise_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 weights [.., out, in] and scales [.., out] float32."""
    scales = weight.float().abs().amax(-1).clamp_(min=1e-12) / 127
    return (weight.float() / scales[..., None]).round().to(torch.int8), scales


def quantise_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return bytes [out, in / 2] and scales [out, in / 128] float32; `in` is in whole groups."""
    outputs, inputs = weight.shape
    assert inputs % GROUP == 0, f"{inputs} inputs are not in groups of {GROUP}"
    groups = weight.float().view(outputs, -1, GROUP)
    scales = groups.abs().amax(-1).clamp_(min=1e-12) / 7
    nibbles = (groups / scales[..., None]).round().add_(8).to(torch.uint8)
    low, high = nibbles.chunk(2, dim=-1)
    return (low | high << 4).flatten(1), scales


def dequantise_int4(packed: Tensor, scales: Tensor) -> Tensor:
    """Return the float32 weights [out, in] that quantise_int4 has packed."""
    groups = packed.view(packed.shape[0], -1, GROUP // 2)
    nibbles = torch.cat([groups & 15, groups >> 4], dim=-1).float() - 8
    return (nibbles * scales[..., None]).flatten(1)
