"""All experts of a layer side by side in memory, so that one launch computes them all."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from baton.kernels.clamped_swiglu import clamped_swiglu
from baton.kernels.expert_mlp import ExpertMatrices, expert_mlp, mxfp4_matrices, stack
from baton.models.blocks.mlp import Mlp
from baton.models.blocks.mxfp4 import GROUP
from baton.models.decoder_spec import MoeSpec
from baton.models.weights import ALL, Checkpoint
from baton.parallel.group import Group
from baton.parallel.split import even


class StackedExperts:
    """The experts of a layer that one place has all of."""

    def __init__(
        self, gate_up: ExpertMatrices, gate: Callable[[Tensor], Tensor], down: ExpertMatrices
    ) -> None:
        self._gate_up = gate_up
        self._gate = gate
        self._down = down

    def __call__(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted sum [tokens, hidden] of what its experts give each row of x."""
        return expert_mlp(x, chosen, weights, self._gate_up, self._gate, self._down)


def stack_experts(experts: Sequence[Mlp]) -> StackedExperts:
    """Copy the experts' matrices; the experts themselves are not needed any more."""
    return StackedExperts(
        stack([expert.gate_up for expert in experts]),
        experts[0].gate,
        stack([expert.down for expert in experts]),
    )


def keeps_mxfp4(spec: MoeSpec, checkpoint: Checkpoint, stem: str, tp: Group) -> bool:
    """Return whether the experts are kept in MXFP4, and a rank's part of each is whole groups."""
    part = spec.intermediate % (tp.size * GROUP) == 0
    return spec.names.stacked and part and f"{stem}.gate_up_proj_blocks" in checkpoint


def read_mxfp4(
    spec: MoeSpec, checkpoint: Checkpoint, stem: str, hidden: int, tp: Group
) -> StackedExperts:
    """Read this rank's part of experts in MXFP4, to be computed as they are."""
    assert spec.swiglu_limits is not None
    alpha, limit = spec.swiglu_limits
    experts, width = spec.routing.experts, spec.intermediate
    part = even(width, tp.rank, tp.size)
    both = slice(2 * part.start, 2 * part.stop)
    groups = slice(part.start // GROUP, part.stop // GROUP)

    def matrices(
        name: str, shape: tuple[int, int, int], cut: tuple[slice, slice]
    ) -> tuple[Tensor, Tensor]:
        count = shape[2] // GROUP
        where, whole = (ALL, *cut), (*shape[:2], count)
        return (
            checkpoint.take_bytes(f"{stem}.{name}_blocks", *whole, GROUP // 2, cut=where),
            checkpoint.take_bytes(f"{stem}.{name}_scales", *whole, cut=where),
        )

    gate_up = matrices("gate_up_proj", (experts, 2 * width, hidden), (both, ALL))
    down = matrices("down_proj", (experts, hidden, width), (ALL, groups))
    bias = checkpoint.take(f"{stem}.gate_up_proj_bias", experts, 2 * width, cut=(ALL, both))
    down_bias = checkpoint.take(f"{stem}.down_proj_bias", experts, hidden)
    return StackedExperts(
        mxfp4_matrices(_in_turn(gate_up[0]), _in_turn(gate_up[1]), _in_turn(bias)),
        partial(clamped_swiglu, alpha=alpha, limit=limit),
        mxfp4_matrices(*down, down_bias if tp.rank == 0 else None),
    )


def _in_turn(rows: Tensor) -> Tensor:
    """Put the rows of gate, kept in turn with those of up, before them [experts, rows, ..]."""
    return torch.cat([rows[:, 0::2], rows[:, 1::2]], dim=1)
