"""Feed-forward layers as native operations: from the normed stream into the stream."""

from baton.kernels.native.library import Gate, Kind
from baton.models.decoder_spec import MlpSpec
from baton.models.native_ops import Operations

_GATES = {"silu": Gate.SILU, "gelu_tanh": Gate.GELU_TANH}


def mlp(ops: Operations, spec: MlpSpec, prefix: str, norm: str) -> None:
    """Append gate and up by one matrix, the gate, and down, perhaps normed on its way out."""
    wide = spec.intermediate
    parts = [(f"{prefix}gate_proj", wide), (f"{prefix}up_proj", wide)]
    whole = f"{prefix}gate_up_proj"
    ops.linear("normed", "gate_up", parts, width=ops.hidden, bias=spec.bias, whole=whole)
    gate = _GATES[spec.activation]
    ops.append(Kind.GATE, x="gate_up", out=ops.room("gated", wide), width=wide, top_k=1, gate=gate)
    down = [(f"{prefix}down_proj", ops.hidden)]
    ops.into_stream("gated", down, width=wide, bias=spec.bias, norm=norm)
