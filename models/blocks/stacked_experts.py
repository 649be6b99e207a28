"""All experts of a layer side by side in memory, so that one launch computes them all."""

from collections.abc import Sequence

from torch import Tensor

from baton.kernels.expert_mlp import expert_mlp, stack
from baton.kernels.linear import Linear
from baton.models.blocks.mlp import Mlp


class StackedExperts:
    """The experts of a layer that one place has all of."""

    def __init__(self, experts: Sequence[Mlp]) -> None:
        """Copy the experts' matrices; the experts themselves are not needed any more."""
        self._gate_up = stack([expert.gate_up for expert in experts])
        self._down = stack([expert.down for expert in experts])
        self._gate = experts[0].gate

    def __call__(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted sum [tokens, hidden] of what its experts give each row of x."""
        return expert_mlp(x, chosen, weights, self._gate_up, self._gate, self._down)

    def views(self) -> list[Mlp]:
        """Return the experts one by one, as views of what is stacked."""
        pairs = []
        for matrices in (self._gate_up, self._down):
            biases = [None] * len(matrices.weight) if matrices.bias is None else matrices.bias
            pairs.append([Linear(*both) for both in zip(matrices.weight, biases, strict=True)])
        return [Mlp(gate_up, self._gate, down) for gate_up, down in zip(*pairs, strict=True)]
