"""The gate of a GeGLU feed-forward layer (Shazeer, 2020), with GELU approximated by tanh."""

from torch import Tensor
from torch.nn import functional

from baton.kernels.backend import triton_serves


def gelu_mul(gate_up: Tensor) -> Tensor:
    """Return gelu(gate) × up, [tokens, n], for gate and up side by side in [tokens, 2n]."""
    if triton_serves(gate_up):
        from baton.kernels.triton.gate_mul import gate_mul

        return gate_mul(gate_up, "gelu_tanh")
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.gelu(gate, approximate="tanh").mul_(up)
