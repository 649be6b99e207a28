"""Which experts a token visits, and how much each counts."""

import torch
from torch import Tensor

from baton.kernels.linear import Linear
from baton.models.decoder_spec import RoutingSpec


class Router:
    """Scores experts, perhaps limits them to the best groups, and takes the best."""

    def __init__(self, spec: RoutingSpec, scores: Linear, correction: Tensor | None) -> None:
        self._spec = spec
        self._scores = scores
        self._correction = correction

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return experts [tokens, top_k] (int64) and their weights for x [tokens, hidden]."""
        spec = self._spec
        logits = self._scores(x).float()
        if spec.scoring == "top_softmax":
            best, experts = logits.topk(spec.top_k, dim=-1)
            return experts, best.softmax(-1).to(x.dtype)
        scores = logits.sigmoid() if spec.scoring == "sigmoid" else logits.softmax(-1)
        choice = scores if self._correction is None else scores + self._correction
        if spec.groups > 1:
            choice = self._limit_to_groups(choice)
        experts = choice.topk(spec.top_k, dim=-1).indices
        weights = scores.gather(1, experts)
        if spec.normalise:
            weights = weights / weights.sum(-1, keepdim=True)
        return experts, weights.mul_(spec.scale).to(x.dtype)

    def _limit_to_groups(self, choice: Tensor) -> Tensor:
        """Return the choice with -inf for experts that are in none of a token's best groups.

        A group is as good as its best expert, or, with a correction, as its two best together.
        """
        spec = self._spec
        groups = choice.view(choice.shape[0], spec.groups, spec.experts // spec.groups)
        counted = 1 if self._correction is None else 2
        quality = groups.topk(counted, dim=-1).values.sum(-1)
        best = quality.topk(spec.top_groups, dim=-1).indices
        refused = torch.ones_like(quality, dtype=torch.bool).scatter_(1, best, False)
        return groups.masked_fill(refused[..., None], float("-inf")).view(choice.shape)
