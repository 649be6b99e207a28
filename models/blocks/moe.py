"""A mixture of experts: each expert computes the tokens that chose it, all at once."""

from functools import partial

import torch
from torch import Tensor

from baton.kernels.clamped_swiglu import clamped_swiglu
from baton.kernels.linear import Linear
from baton.models.blocks.mlp import Mlp, load_mlp
from baton.models.blocks.mxfp4 import dequantise
from baton.models.blocks.routing import Router
from baton.models.decoder_spec import MlpSpec, MoeSpec
from baton.models.weights import Checkpoint


class Moe:
    """Router, experts and perhaps an expert that all tokens visit."""

    def __init__(self, spec: MoeSpec, checkpoint: Checkpoint, prefix: str, hidden: int) -> None:
        self._router = _load_router(spec, checkpoint, prefix, hidden)
        load = _load_stacked if spec.names.stacked else _load_apart
        self._experts = load(spec, checkpoint, prefix + spec.names.experts, hidden)
        self._shared: Mlp | None = None
        if spec.shared is not None:
            self._shared = load_mlp(spec.shared, checkpoint, f"{prefix}mlp.shared_experts.", hidden)

    def __call__(self, x: Tensor) -> Tensor:
        """Return [tokens, hidden] for x [tokens, hidden]."""
        experts, weights = self._router(x)
        top_k = experts.shape[1]
        order = experts.flatten().argsort(stable=True)
        counts = experts.flatten().bincount(minlength=len(self._experts)).tolist()
        rows = order // top_k
        parts = []
        for expert, chosen in zip(self._experts, torch.split(rows, counts), strict=True):
            if chosen.shape[0]:
                parts.append(expert(x[chosen]))
        found = torch.cat(parts).mul_(weights.flatten()[order, None])
        out = torch.zeros_like(x) if self._shared is None else self._shared(x)
        return out.index_add_(0, rows, found)


def _load_router(spec: MoeSpec, checkpoint: Checkpoint, prefix: str, hidden: int) -> Router:
    name, routing = prefix + spec.names.router, spec.routing
    weight = checkpoint.take(f"{name}.weight", routing.experts, hidden)
    bias = checkpoint.take(f"{name}.bias", routing.experts) if routing.bias else None
    correction = None
    if routing.correction:
        correction = checkpoint.take(f"{name}.e_score_correction_bias", routing.experts).float()
    return Router(routing, Linear(weight, bias), correction)


def _load_apart(spec: MoeSpec, checkpoint: Checkpoint, stem: str, hidden: int) -> list[Mlp]:
    """Read experts that are kept as so many feed-forward layers."""
    names = (spec.names.gate, spec.names.up, spec.names.down)
    mlp = MlpSpec(spec.intermediate)
    return [
        load_mlp(mlp, checkpoint, f"{stem}.{expert}.", hidden, names)
        for expert in range(spec.routing.experts)
    ]


def _load_stacked(spec: MoeSpec, checkpoint: Checkpoint, stem: str, hidden: int) -> list[Mlp]:
    """Read experts that are kept in one tensor, gate and up row by row in turn."""
    assert spec.swiglu_limits is not None
    alpha, limit = spec.swiglu_limits
    gate = partial(clamped_swiglu, alpha=alpha, limit=limit)
    experts, width = spec.routing.experts, spec.intermediate
    gate_up = _Stack(checkpoint, f"{stem}.gate_up_proj", (experts, 2 * width, hidden))
    down = _Stack(checkpoint, f"{stem}.down_proj", (experts, hidden, width))
    gate_up_bias = checkpoint.take(f"{stem}.gate_up_proj_bias", experts, 2 * width)
    down_bias = checkpoint.take(f"{stem}.down_proj_bias", experts, hidden)
    return [
        Mlp(
            Linear(_in_turn(gate_up(expert)), _in_turn(gate_up_bias[expert])),
            gate,
            Linear(down(expert).contiguous(), down_bias[expert]),
        )
        for expert in range(experts)
    ]


def _in_turn(rows: Tensor) -> Tensor:
    return torch.cat([rows[0::2], rows[1::2]])


class _Stack:
    """An expert's matrix [out, in] at a time, from a stack in floats or in MXFP4."""

    def __init__(self, checkpoint: Checkpoint, name: str, shape: tuple[int, int, int]) -> None:
        experts, rows, width = shape
        self._dtype = checkpoint.dtype
        self._scales: Tensor | None = None
        if f"{name}_blocks" in checkpoint:
            self._stack = checkpoint.take_bytes(f"{name}_blocks", experts, rows, width // 32, 16)
            self._scales = checkpoint.take_bytes(f"{name}_scales", experts, rows, width // 32)
        else:
            self._stack = checkpoint.take(name, experts, width, rows).transpose(1, 2)

    def __call__(self, expert: int) -> Tensor:
        if self._scales is None:
            return self._stack[expert]
        return dequantise(self._stack[expert], self._scales[expert]).to(self._dtype)
