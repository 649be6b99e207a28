"""A gated feed-forward layer."""

from collections.abc import Callable

from torch import Tensor

from baton.kernels.gelu_mul import gelu_mul
from baton.kernels.linear import Linear
from baton.kernels.silu_mul import silu_mul
from baton.models.blocks.linears import column_parallel, row_parallel
from baton.models.decoder_spec import MlpSpec
from baton.models.weights import Checkpoint, Rows
from baton.parallel.group import Group
from baton.parallel.split import even

Gate = Callable[[Tensor], Tensor]

_GATES: dict[str, Gate] = {"silu": silu_mul, "gelu_tanh": gelu_mul}


class Mlp:
    """Gate and up by one matrix, the gate, and down; a rank has some of the columns in between."""

    def __init__(self, gate_up: Linear, gate: Gate, down: Linear) -> None:
        self.gate_up = gate_up
        self.gate = gate
        self.down = down

    def __call__(self, x: Tensor) -> Tensor:
        """Return this rank's part of the sum [tokens, hidden] for x [tokens, hidden]."""
        return self.down(self.gate(self.gate_up(x)))


def load_mlp(
    spec: MlpSpec,
    checkpoint: Checkpoint,
    prefix: str,
    hidden: int,
    tp: Group,
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> Mlp:
    """Read this rank's part of the matrices below `prefix`, by the names of gate, up and down."""
    gate, up, down = (prefix + name for name in names)
    wide = spec.intermediate
    own = even(wide, tp.rank, tp.size)
    parts, whole = [Rows(gate, wide, own), Rows(up, wide, own)], f"{prefix}gate_up_proj"
    gate_up = column_parallel(checkpoint, whole, parts, width=hidden, bias=spec.bias)
    back = row_parallel(checkpoint, down, (hidden, wide), tp, bias=spec.bias)
    return Mlp(gate_up, _GATES[spec.activation], back)
