"""Mixtures of experts as native operations: from the normed stream into the stream."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from baton.kernels.native.library import Gate, Kind, Matrix, Routing, Scoring
from baton.models.blocks.mxfp4 import dequantise
from baton.models.decoder_spec import MoeSpec
from baton.models.native_mlp import mlp
from baton.models.native_ops import Operations
from baton.models.weights import Checkpoint

_SCORINGS = {
    "softmax": Scoring.SOFTMAX,
    "sigmoid": Scoring.SIGMOID,
    "top_softmax": Scoring.TOP_SOFTMAX,
}


def mixture(ops: Operations, spec: MoeSpec, prefix: str) -> None:
    """Append router, experts, and the shared expert that some families have."""
    _route(ops, spec, prefix)
    routing, wide, hidden = spec.routing, spec.intermediate, ops.hidden
    experts, top_k = routing.experts, routing.top_k
    load = _stacked if spec.names.stacked else _apart
    gate_up, down, biases = load(ops, spec, prefix + spec.names.experts)
    spread = ops.room("spread", hidden, top_k)
    ops.append(Kind.SPREAD, x="normed", out=spread, width=hidden, top_k=top_k)
    both = ops.room("experts gate_up", 2 * wide, top_k)
    ops.append(
        Kind.EXPERTS, x=spread, out=both, heads=experts, width=hidden,
        weight=ops.weights.array(gate_up), bias=ops.weights.floats(biases[0]),
    )  # fmt: skip
    alpha, limit = spec.swiglu_limits or (0.0, 0.0)
    gate = Gate.CLAMPED_SWIGLU if spec.swiglu_limits else Gate.SILU
    gated = ops.room("experts gated", wide, top_k)
    ops.append(
        Kind.GATE, x=both, out=gated, width=wide, top_k=top_k, gate=gate, alpha=alpha, limit=limit
    )
    back = ops.room("experts out", hidden, top_k)
    ops.append(
        Kind.EXPERTS, x=gated, out=back, heads=experts, width=wide,
        weight=ops.weights.array(down), bias=ops.weights.floats(biases[1]),
    )  # fmt: skip
    if spec.shared is not None:
        mlp(ops, spec.shared, f"{prefix}mlp.shared_experts.", "")
    ops.append(Kind.COMBINE, x=back, out=ops.stream, width=hidden, top_k=top_k)


def _route(ops: Operations, spec: MoeSpec, prefix: str) -> None:
    """Append what finds each token's experts and brings tokens of one expert together.

    Scores are computed in float32 whatever the dtype: another expert is another result.
    """
    name, routing = prefix + spec.names.router, spec.routing
    experts, top_k = routing.experts, routing.top_k
    weight = ops.checkpoint.take_stored(f"{name}.weight", experts, ops.hidden)
    bias = ops.checkpoint.take(f"{name}.bias", experts) if routing.bias else None
    correction = None
    if routing.correction:
        correction = ops.checkpoint.take(f"{name}.e_score_correction_bias", experts)
    ops.product("normed", "router", ops.weights.matrix([weight], exact=True), bias)
    how = Routing(
        experts=experts,
        top_k=top_k,
        scoring=_SCORINGS[routing.scoring],
        normalise=routing.normalise,
        scale=routing.scale,
        groups=routing.groups,
        top_groups=routing.top_groups,
        correction=ops.weights.floats(correction),
    )
    ops.append(Kind.ROUTE, x="router", weight=ops.weights.keep(how))
    ops.append(Kind.GROUP, heads=experts, top_k=top_k)


_Experts = tuple[list[Matrix], list[Matrix], tuple[Tensor | None, Tensor | None]]


def _apart(ops: Operations, spec: MoeSpec, stem: str) -> _Experts:
    """Read experts that are kept as so many feed-forward layers."""
    wide, hidden, names = spec.intermediate, ops.hidden, spec.names
    gate_up, down = [], []
    for expert in range(spec.routing.experts):
        at = f"{stem}.{expert}."
        parts = [
            ops.checkpoint.take_stored(f"{at}{name}.weight", wide, hidden)
            for name in (names.gate, names.up)
        ]
        gate_up.append(ops.weights.matrix(parts))
        back = ops.checkpoint.take_stored(f"{at}{names.down}.weight", hidden, wide)
        down.append(ops.weights.matrix([back]))
    return gate_up, down, (None, None)


def _stacked(ops: Operations, spec: MoeSpec, stem: str) -> _Experts:
    """Read experts that are kept in one tensor, gate and up row by row in turn."""
    experts, wide, hidden = spec.routing.experts, spec.intermediate, ops.hidden
    checkpoint, pack = ops.checkpoint, ops.weights.matrix
    both = _stack(checkpoint, f"{stem}.gate_up_proj", (experts, 2 * wide, hidden))
    gate_up = [pack([rows[0::2], rows[1::2]]) for rows in both]
    down = [
        pack([rows]) for rows in _stack(checkpoint, f"{stem}.down_proj", (experts, hidden, wide))
    ]
    bias = checkpoint.take(f"{stem}.gate_up_proj_bias", experts, 2 * wide)
    in_turn = torch.cat([bias[:, 0::2], bias[:, 1::2]], dim=1)
    return gate_up, down, (in_turn, checkpoint.take(f"{stem}.down_proj_bias", experts, hidden))


def _stack(checkpoint: Checkpoint, name: str, shape: Sequence[int]) -> Iterator[Tensor]:
    """Yield each expert's matrix [out, in] of a stack in floats or in MXFP4.

    An MXFP4 value has one binary digit after its leading one: bfloat16 holds it exactly.
    """
    experts, rows, width = shape
    if f"{name}_blocks" not in checkpoint:
        yield from checkpoint.take_stored(name, experts, width, rows).transpose(1, 2)
        return
    blocks = checkpoint.take_bytes(f"{name}_blocks", experts, rows, width // 32, 16)
    scales = checkpoint.take_bytes(f"{name}_scales", experts, rows, width // 32)
    for expert in range(experts):
        yield dequantise(blocks[expert], scales[expert]).to(torch.bfloat16)
