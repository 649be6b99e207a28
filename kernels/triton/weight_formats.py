"""Weights in 8 and 4 bits, as skinny_linear.py and grouped_linear.py read them.

    float8, int8   [out, in], a scale per output                    w = stored × scale
    int4           bytes [out, in / 2], a scale per output and      w = (nibble - 8) × scale
                   group of 128 inputs, perhaps a zero as well      w = (nibble - zero) × scale

    MXFP4          bytes [out, bytes], a scale per output and      w = e2m1 × 2 ** (scale - 127)
                   group of 32 inputs, in a byte                   (models/blocks/mxfp4.py)

A group of 128 inputs is 64 bytes; byte j holds input j in its lower half and input 64 + j in the
upper one, so that either half of all bytes is a run of inputs, and nothing is interleaved again
after it is read. MXFP4 has groups of 32 by twos in the same way, the earlier one in the lower
halves of 32 bytes; where there is no second one, it is 0.
"""

import torch
from torch import Tensor
from torch.nn import functional

GROUP = 128
MX_GROUP = 32


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
    return _nibbles((groups / scales[..., None]).round().add_(8)), scales


def quantise_int4_from_zeros(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return bytes and scales as quantise_int4, and zeros [out, in / 128] uint8.

    Each group's range is used whole, wherever it lies.
    """
    groups = weight.float().view(weight.shape[0], -1, GROUP)
    low, high = groups.amin(-1).clamp_(max=0), groups.amax(-1).clamp_(min=0)
    scales = (high - low).clamp_(min=1e-12) / 15
    zeros = (-low / scales).round()
    steps = (groups / scales[..., None]).round() + zeros[..., None]
    return _nibbles(steps.clamp_(0, 15)), scales, zeros.to(torch.uint8)


def _nibbles(values: Tensor) -> Tensor:
    """Return bytes [out, in / 2] of whole numbers under 16 [out, groups, 128]."""
    low, high = values.to(torch.uint8).chunk(2, dim=-1)
    return (low | high << 4).flatten(1)


def dequantise_int4(packed: Tensor, scales: Tensor, zeros: Tensor | None = None) -> Tensor:
    """Return the float32 weights [out, in] that were packed."""
    groups = packed.view(packed.shape[0], -1, GROUP // 2)
    nibbles = torch.cat([groups & 15, groups >> 4], dim=-1).float()
    nibbles -= 8 if zeros is None else zeros[..., None]
    return (nibbles * scales[..., None]).flatten(1)


def pack_mxfp4(blocks: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Return published MXFP4 as kernels want it: bytes [.., out, bytes], scales [.., out, groups].

    Published are bytes [.., out, groups, 16], of which byte j holds inputs 2j and 2j + 1 of the
    group, and scales [.., out, groups].
    """
    nibbles = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2)
    if nibbles.shape[-2] % 2:
        nibbles = functional.pad(nibbles, (0, 0, 0, 1))
        scales = functional.pad(scales, (0, 1))
    low, high = nibbles[..., 0::2, :], nibbles[..., 1::2, :]
    return (low | high << 4).flatten(-2), scales.contiguous()
