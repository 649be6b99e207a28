"""The matrices of a layer's experts: this rank's experts, and its part of each."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from baton.kernels.clamped_swiglu import clamped_swiglu
from baton.kernels.linear import Linear
from baton.models.blocks.mlp import Mlp, load_mlp
from baton.models.blocks.mxfp4 import GROUP, dequantise
from baton.models.decoder_spec import MlpSpec, MoeSpec
from baton.models.weights import ALL, Checkpoint
from baton.parallel.group import Group
from baton.parallel.split import even


def load_experts(
    spec: MoeSpec, checkpoint: Checkpoint, stem: str, hidden: int, tp: Group, own: Sequence[int]
) -> list[Mlp]:
    """Read the experts `own`, in that order."""
    load = _load_stacked if spec.names.stacked else _load_apart
    return load(spec, checkpoint, stem, hidden, tp, own)


def _load_apart(
    spec: MoeSpec, checkpoint: Checkpoint, stem: str, hidden: int, tp: Group, own: Sequence[int]
) -> list[Mlp]:
    """Read experts that are kept as so many feed-forward layers."""
    names = (spec.names.gate, spec.names.up, spec.names.down)
    mlp = MlpSpec(spec.intermediate)
    for expert in set(range(spec.routing.experts)).difference(own):
        checkpoint.leave(*(f"{stem}.{expert}.{name}.weight" for name in names))
    return [load_mlp(mlp, checkpoint, f"{stem}.{expert}.", hidden, tp, names) for expert in own]


def _load_stacked(
    spec: MoeSpec, checkpoint: Checkpoint, stem: str, hidden: int, tp: Group, own: Sequence[int]
) -> list[Mlp]:
    """Read experts that are kept in one tensor, gate and up row by row in turn."""
    assert spec.swiglu_limits is not None
    alpha, limit = spec.swiglu_limits
    gate = partial(clamped_swiglu, alpha=alpha, limit=limit)
    experts, width = spec.routing.experts, spec.intermediate
    part = even(width, tp.rank, tp.size)
    both = slice(2 * part.start, 2 * part.stop)
    gate_up = _Stack(checkpoint, f"{stem}.gate_up_proj", (experts, 2 * width, hidden))
    down = _Stack(checkpoint, f"{stem}.down_proj", (experts, hidden, width))
    gate_up_bias = checkpoint.take(f"{stem}.gate_up_proj_bias", experts, 2 * width)
    down_bias = checkpoint.take(f"{stem}.down_proj_bias", experts, hidden)
    return [
        Mlp(
            Linear(_in_turn(gate_up(expert, both, ALL)), _in_turn(gate_up_bias[expert, both])),
            gate,
            Linear(
                down(expert, ALL, part).contiguous(),
                down_bias[expert] if tp.rank == 0 else None,
            ),
        )
        for expert in own
    ]


def _in_turn(rows: Tensor) -> Tensor:
    return torch.cat([rows[0::2], rows[1::2]])


class _Stack:
    """Parts of an expert's matrix [out, in], from a stack in floats or in MXFP4."""

    def __init__(self, checkpoint: Checkpoint, name: str, shape: tuple[int, int, int]) -> None:
        self._checkpoint = checkpoint
        self._name = name
        self._shape = shape

    def __call__(self, expert: int, rows: slice, columns: slice) -> Tensor:
        """Read some rows and columns; those of MXFP4 begin and end within groups of columns."""
        name, take_bytes = self._name, self._checkpoint.take_bytes
        experts, height, width = self._shape
        one = slice(expert, expert + 1)
        if f"{name}_blocks" not in self._checkpoint:
            shape = (experts, width, height)
            return self._checkpoint.take(name, *shape, cut=(one, columns, rows))[0].T
        start, stop, _ = columns.indices(width)
        groups = slice(start // GROUP, -(-stop // GROUP))
        cut, count = (one, rows, groups), width // GROUP
        blocks = take_bytes(f"{name}_blocks", experts, height, count, GROUP // 2, cut=cut)
        scales = take_bytes(f"{name}_scales", experts, height, count, cut=cut)
        first = groups.start * GROUP
        found = dequantise(blocks[0], scales[0])[:, start - first : stop - first]
        return found.to(self._checkpoint.dtype)
