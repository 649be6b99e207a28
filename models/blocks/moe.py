"""A mixture of experts: each expert computes the tokens that chose it, all at once."""

import torch
from torch import Tensor

from baton.kernels.backend import triton_on
from baton.kernels.linear import Linear
from baton.models.blocks.experts import load_experts
from baton.models.blocks.mlp import Mlp, load_mlp
from baton.models.blocks.routing import Router
from baton.models.blocks.stacked_experts import (
    StackedExperts,
    keeps_mxfp4,
    read_mxfp4,
    stack_experts,
)
from baton.models.decoder_spec import MoeSpec
from baton.models.weights import Checkpoint
from baton.parallel.expert_exchange import ExpertExchange
from baton.parallel.expert_placement import Placement
from baton.parallel.group import Ranks


class Moe:
    """Router, experts and perhaps an expert that all tokens visit.

    Every rank routes its place's tokens. The experts are spread over the places along ep, and each
    of them, as the shared one, is split over tp like any feed-forward layer.
    """

    def __init__(
        self,
        spec: MoeSpec,
        checkpoint: Checkpoint,
        prefix: str,
        hidden: int,
        ranks: Ranks,
        placement: Placement,
    ) -> None:
        self._spec = spec
        self._stem = prefix + spec.names.experts
        self._hidden = hidden
        self._ranks = ranks
        self._router = _load_router(spec, checkpoint, prefix, hidden)
        self._experts: dict[int, Mlp] = {}
        self._exchange: ExpertExchange | None = None
        self._stacked: StackedExperts | None = None
        """Instead of the two before, where one place computes all experts at once."""
        self.place(placement, checkpoint)
        self._shared: Mlp | None = None
        if spec.shared is not None:
            at = f"{prefix}mlp.shared_experts."
            self._shared = load_mlp(spec.shared, checkpoint, at, hidden, ranks.tp)

    def place(self, placement: Placement, checkpoint: Checkpoint) -> None:
        """Have the experts that `placement` says; read those that are new and let others go."""
        own, ranks = placement.held[self._ranks.ep.rank], self._ranks
        if ranks.ep.size == 1 and triton_on(checkpoint.device):
            self._stack(checkpoint)
            return
        new = [expert for expert in own if expert not in self._experts]
        read = load_experts(self._spec, checkpoint, self._stem, self._hidden, ranks.tp, new)
        found = self._experts | dict(zip(new, read, strict=True))
        self._experts = {expert: found[expert] for expert in own}
        experts = list(self._experts.values())
        self._exchange = ExpertExchange(ranks.ep, placement, experts, checkpoint.device)

    def _stack(self, checkpoint: Checkpoint) -> None:
        """Have all experts side by side; there is no other place that they could be at."""
        spec, stem, tp = self._spec, self._stem, self._ranks.tp
        if self._stacked is not None:
            return
        if keeps_mxfp4(spec, checkpoint, stem, tp):
            self._stacked = read_mxfp4(spec, checkpoint, stem, self._hidden, tp)
            return
        every = range(spec.routing.experts)
        self._stacked = stack_experts(load_experts(spec, checkpoint, stem, self._hidden, tp, every))

    @property
    def loads(self) -> Tensor:
        """How often this place's tokens have chosen each expert [experts] since it was placed.

        Not counted where one place computes all experts at once.
        """
        if self._exchange is None:
            return torch.zeros(self._spec.routing.experts, dtype=torch.int64)
        return self._exchange.loads

    def __call__(self, x: Tensor) -> Tensor:
        """Return this rank's part of the sum [tokens, hidden] for x [tokens, hidden].

        A token's experts are added in the order of its choice, wherever they are and whoever else
        chose them.
        """
        experts, weights = self._router(x)
        if self._stacked is not None:
            out = self._stacked(x, experts, weights)
            return out if self._shared is None else out.add_(self._shared(x))
        assert self._exchange is not None
        answers = self._exchange(x, experts.long()).mul_(weights.to(x.dtype)[..., None])
        out = torch.zeros_like(x) if self._shared is None else self._shared(x)
        for answer in answers.unbind(1):
            out += answer
        return out


def _load_router(spec: MoeSpec, checkpoint: Checkpoint, prefix: str, hidden: int) -> Router:
    name, routing = prefix + spec.names.router, spec.routing
    weight = checkpoint.take(f"{name}.weight", routing.experts, hidden)
    bias = checkpoint.take(f"{name}.bias", routing.experts) if routing.bias else None
    correction = None
    if routing.correction:
        correction = checkpoint.take(f"{name}.e_score_correction_bias", routing.experts).float()
    return Router(routing, Linear(weight, bias), correction)
