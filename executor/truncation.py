"""Which tokens may be drawn, and how likely they are: temperature and the cuts of the unlikely."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from baton.core.request import SamplingParams

_OUT = float("-inf")
_Cut = Callable[[Tensor, Sequence[SamplingParams]], Tensor]


def truncated(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Return the logits after temperature, top-k, top-p, min-p and typical-p; what is cut is -inf.

    The order and the arithmetic are those of Hugging Face's logits warpers, each on what the one
    before it has left: at least one token is kept, and so are all that tie with the least likely
    one kept. `logits` are float32 [rows, vocabulary], and stay as they are.
    """
    vocabulary = logits.shape[1]
    temperatures = torch.tensor([p.temperature for p in params], device=logits.device)
    scores = logits / temperatures[:, None]
    if rows := [i for i, p in enumerate(params) if 0 < p.top_k < vocabulary or p.top_p < 1]:
        _cut_rows_(scores, params, rows, _cut_top)
    if rows := [i for i, p in enumerate(params) if p.min_p > 0]:
        _cut_rows_(scores, params, rows, _cut_min_p)
    if rows := [i for i, p in enumerate(params) if p.typical_p < 1]:
        _cut_rows_(scores, params, rows, _cut_those_untypical)
    return scores


def _cut_rows_(
    scores: Tensor, params: Sequence[SamplingParams], rows: Sequence[int], cut: _Cut
) -> None:
    index = torch.tensor(rows, device=scores.device)
    scores[index] = cut(scores[index], [params[row] for row in rows])


def _cut_top(scores: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Cut by top-k, then by top-p; both look at the same sorted row."""
    device, vocabulary = scores.device, scores.shape[1]
    ordered = _ascending(scores)
    first = [vocabulary - p.top_k if 0 < p.top_k < vocabulary else 0 for p in params]
    least = ordered.gather(1, torch.tensor(first, device=device)[:, None])
    ordered.masked_fill_(ordered < least, _OUT)
    # Without top-p no cumulative probability is as low as the bound.
    bounds = torch.tensor([1 - p.top_p if p.top_p < 1 else -1.0 for p in params], device=device)
    removed = torch.softmax(ordered, dim=-1).cumsum(-1) <= bounds[:, None]
    removed |= ordered == _OUT
    removed[:, -1] = False
    least = ordered.gather(1, removed.sum(-1, keepdim=True))
    return scores.masked_fill(scores < least, _OUT)


def _cut_min_p(scores: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Cut what is less likely than `min_p` times the likeliest."""
    probabilities = torch.softmax(scores, dim=-1)
    shares = torch.tensor([p.min_p for p in params], device=scores.device)
    least = shares[:, None] * probabilities.amax(-1, keepdim=True)
    return scores.masked_fill(probabilities < least, _OUT)


def _cut_those_untypical(scores: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    return cut_untypical(scores, torch.tensor([p.typical_p for p in params], device=scores.device))


def cut_untypical(scores: Tensor, masses: Tensor) -> Tensor:
    """Keep the tokens whose information is nearest the entropy (Meister et al., 2022).

    They have the probability `masses` [rows] together, or just more; what is cut is -inf.
    """
    logprobs = torch.log_softmax(scores, dim=-1)
    entropy = -(logprobs * logprobs.exp()).nansum(-1, keepdim=True)
    distances = (-logprobs - entropy).abs()
    ordered, order = _ascending_with_order(distances)
    reached = torch.softmax(scores.gather(1, order), dim=-1).cumsum(-1)
    last = (reached < masses[:, None]).sum(-1, keepdim=True).clamp_(max=scores.shape[1] - 1)
    # At least the most typical one stays: its distance is no larger than any.
    return scores.masked_fill(distances > ordered.gather(1, last), _OUT)


def _ascending(scores: Tensor) -> Tensor:
    """Return each row sorted; on CPUs by numpy, which takes a fiftieth of torch's time."""
    if scores.device.type == "cpu":
        return torch.from_numpy(np.sort(scores.numpy(), axis=-1))
    return scores.sort(dim=-1).values


def _ascending_with_order(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row sorted, and where each of its values was."""
    if values.device.type == "cpu":
        order = torch.from_numpy(np.argsort(values.numpy(), axis=-1))
        return values.gather(1, order), order
    found = values.sort(dim=-1)
    return found.values, found.indices
