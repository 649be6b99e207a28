"""Which experts a token visits, and how much each counts."""

import torch
from torch import Tensor

from baton.kernels.backend import triton_serves
from baton.kernels.routing import Routing


def route(
    logits: Tensor, routing: Routing, correction: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return experts [tokens, top_k], best first, and their weights in float32.

    `logits` are [tokens, experts]; `correction` [experts] counts in the choice and not in the
    weights. Experts are int64, or int32 where Triton's kernels compute.
    """
    whole = logits.shape[1] & (logits.shape[1] - 1) == 0 or routing.groups == 1
    if triton_serves(logits) and whole:
        from baton.kernels.triton import moe_routing

        return moe_routing.route(logits, routing, correction)
    logits = logits.float()
    if routing.scoring == "top_softmax":
        best, experts = logits.topk(routing.top_k, dim=-1)
        return experts, best.softmax(-1)
    scores = logits.sigmoid() if routing.scoring == "sigmoid" else logits.softmax(-1)
    choice = scores if correction is None else scores + correction
    if routing.groups > 1:
        choice = _limit_to_groups(choice, routing, 1 if correction is None else 2)
    experts = choice.topk(routing.top_k, dim=-1).indices
    weights = scores.gather(1, experts)
    if routing.normalise:
        weights = weights / weights.sum(-1, keepdim=True)
    return experts, weights.mul_(routing.scale)


def _limit_to_groups(choice: Tensor, routing: Routing, counted: int) -> Tensor:
    """Return the choice with -inf for experts that are in none of a token's best groups.

    A group is as good as its best `counted` experts together: its best one or, with a correction,
    two.
    """
    tokens, experts = choice.shape
    groups = choice.view(tokens, routing.groups, experts // routing.groups)
    quality = groups.topk(counted, dim=-1).values.sum(-1)
    best = quality.topk(routing.top_groups, dim=-1).indices
    refused = torch.ones_like(quality, dtype=torch.bool).scatter_(1, best, False)
    return groups.masked_fill(refused[..., None], float("-inf")).view(choice.shape)
