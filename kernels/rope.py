"""Rotary position embedding (Su et al., 2021) in Hugging Face's half-rotation order.

A head's dimensions are pairs (i, i + head_dim / 2), each turned by position × frequency[i].
"""

from typing import NamedTuple

import torch
from torch import Tensor


class RopeAngles(NamedTuple):
    """Cosines and sines of one step's positions, shared by all layers."""

    cos: Tensor
    """[tokens, 1, 1, head_dim / 2]"""
    sin: Tensor
    """[tokens, 1, 2, head_dim / 2]: first negated, then as it is."""


def rope_angles(
    positions: Tensor, frequencies: Tensor, dtype: torch.dtype, magnitude: float = 1.0
) -> RopeAngles:
    """Return the angles for positions [tokens] and frequencies [head_dim / 2], in float32 first.

    What is turned also grows by `magnitude`.
    """
    angles = positions.to(torch.float32)[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    if magnitude != 1.0:
        cos, sin = cos.mul_(magnitude), sin.mul_(magnitude)
    cos, sin = cos.to(dtype), sin.to(dtype)
    return RopeAngles(cos[:, None, None, :], torch.stack((-sin, sin), dim=1)[:, None])


def rope_(heads: Tensor, angles: RopeAngles) -> None:
    """Rotate heads [tokens, heads, head_dim] in place; strides are free but the last's."""
    tokens, count, head_dim = heads.shape
    pairs = heads.view(tokens, count, 2, head_dim // 2)
    swapped = pairs.flip(2)
    pairs.mul_(angles.cos).addcmul_(swapped, angles.sin)


class RopeTables(NamedTuple):
    """Cosines and sines of one step's positions, as kernels on a device want them."""

    cos: Tensor
    """[tokens, turned / 2] float32"""
    sin: Tensor
    """[tokens, turned / 2] float32"""


def rope_tables(positions: Tensor, frequencies: Tensor, magnitude: float = 1.0) -> RopeTables:
    """Return the tables for positions [tokens] and frequencies [turned / 2].

    What is turned also grows by `magnitude`.
    """
    angles = positions.to(torch.float32)[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    if magnitude != 1.0:
        cos, sin = cos.mul_(magnitude), sin.mul_(magnitude)
    return RopeTables(cos, sin)


def rope_by_tables_(heads: Tensor, tables: RopeTables) -> None:
    """Rotate the first dimensions of heads [tokens, heads, head_dim] in place, in float32."""
    half = tables.cos.shape[1]
    first, second = heads[..., :half].float(), heads[..., half : 2 * half].float()
    cos, sin = tables.cos[:, None], tables.sin[:, None]
    turned = first * cos - second * sin, second * cos + first * sin
    heads[..., :half], heads[..., half : 2 * half] = turned
