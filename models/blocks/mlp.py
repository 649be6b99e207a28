"""A gated feed-forward layer."""

from collections.abc import Callable

from torch import Tensor

from baton.kernels.gelu_mul import gelu_mul
from baton.kernels.linear import Linear
from baton.kernels.silu_mul import silu_mul
from baton.models.decoder_spec import MlpSpec
from baton.models.weights import Checkpoint

Gate = Callable[[Tensor], Tensor]

_GATES: dict[str, Gate] = {"silu": silu_mul, "gelu_tanh": gelu_mul}


class Mlp:
    """Gate and up by one matrix, the gate, and down."""

    def __init__(self, gate_up: Linear, gate: Gate, down: Linear) -> None:
        self._gate_up = gate_up
        self._gate = gate
        self._down = down

    def __call__(self, x: Tensor) -> Tensor:
        """Return [tokens, hidden] for x [tokens, hidden]."""
        return self._down(self._gate(self._gate_up(x)))


def load_mlp(
    spec: MlpSpec,
    checkpoint: Checkpoint,
    prefix: str,
    hidden: int,
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> Mlp:
    """Read the matrices below `prefix`, by the names of gate, up and down."""
    gate, up, down = (prefix + name for name in names)
    parts = [(gate, spec.intermediate), (up, spec.intermediate)]
    whole = f"{prefix}gate_up_proj"
    gate_up = checkpoint.take_fused(whole, parts, width=hidden, bias=spec.bias)
    back = checkpoint.take_fused("", [(down, hidden)], width=spec.intermediate, bias=spec.bias)
    return Mlp(Linear(*gate_up), _GATES[spec.activation], Linear(*back))
