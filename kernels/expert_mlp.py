"""The feed-forward layers of many experts at once, each over the tokens that visit it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from baton.kernels.linear import Linear


@dataclass(frozen=True, slots=True)
class ExpertMatrices:
    """One matrix of each expert, and perhaps a bias."""

    weight: Tensor
    """[experts, out, in], or MXFP4 [experts, out, bytes] (kernels/triton/weight_formats.py)"""
    bias: Tensor | None
    """[experts, out]"""
    scales: Tensor | None = None
    """Of MXFP4."""


def stack(matrices: Sequence[Linear]) -> ExpertMatrices:
    """Return matrices of one shape as one tensor, copied."""
    biases = [matrix.bias for matrix in matrices if matrix.bias is not None]
    assert len(biases) in (0, len(matrices)), "a bias for some experts only"
    weight = torch.stack([matrix.weight for matrix in matrices])
    return ExpertMatrices(weight, torch.stack(biases) if biases else None)


def mxfp4_matrices(blocks: Tensor, scales: Tensor, bias: Tensor | None) -> ExpertMatrices:
    """Return matrices in MXFP4 as published (models/blocks/mxfp4.py), packed for kernels.

    `blocks` are [experts, out, groups, 16], scales [experts, out, groups].
    """
    from baton.kernels.triton.weight_formats import pack_mxfp4

    packed, scales = pack_mxfp4(blocks, scales)
    return ExpertMatrices(packed, bias, scales)


def expert_mlp(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    gate_up: ExpertMatrices,
    gate: Callable[[Tensor], Tensor],
    down: ExpertMatrices,
) -> Tensor:
    """Return the weighted sum [tokens, hidden] of what its experts give each row of x.

    `chosen` [tokens, top_k] are whole numbers, `weights` float32 of that shape. By Triton's
    kernels, and nothing is read on the host.
    """
    from baton.kernels.triton.grouped_linear import grouped_linear, tile_rows
    from baton.kernels.triton.moe_routing import order_by_expert

    experts = gate_up.weight.shape[0]
    order = order_by_expert(chosen.to(torch.int32), experts, tile_rows(chosen.numel(), experts))
    wide = grouped_linear(x, gate_up.weight, order, scales=gate_up.scales, bias=gate_up.bias)
    answers = grouped_linear(
        gate(wide), down.weight, order, scales=down.scales, bias=down.bias, weights=weights
    )
    return answers.view(*chosen.shape, -1).sum(1)
