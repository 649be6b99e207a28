"""Chooses next tokens where the logits are: all of it tensors, and nothing read on the host.

It computes what executor/sampler.py does of rows whose sampling is `plain`, but for typical-p; the
parameters are tensors, so that a step which was captured serves any sequences. On a GPU it is four
Triton kernels (kernels/triton/sampling.py), elsewhere torch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from baton.core.request import SamplingParams
from baton.executor.noise import exponential
from baton.kernels.backend import triton_serves

_GREEDY_BELOW = 1e-5
_OUT = float("-inf")


@dataclass(frozen=True, slots=True)
class RowSampling:
    """How rows are sampled; each is [rows]."""

    temperature: Tensor
    """float32; a row under 1e-5 is greedy"""
    top_k: Tensor
    """int32; 0 for none"""
    top_p: Tensor
    """float32; 1 for none"""
    min_p: Tensor
    """float32; 0 for none"""
    seeds: Tensor
    """int64"""
    positions: Tensor
    """int64: where the new tokens stand in their sequences"""


def serves(sampling: SamplingParams) -> bool:
    """Return whether rows with these parameters can be sampled here."""
    return sampling.plain and sampling.typical_p == 1.0


def sample_rows(logits: Tensor, rows: RowSampling) -> Tensor:
    """Return a token [rows] int64 for each row of logits [rows, vocabulary]."""
    if triton_serves(logits):
        from baton.kernels.triton.sampling import SamplingTensors, sample

        return sample(
            logits,
            SamplingTensors(
                rows.temperature, rows.top_k, rows.top_p, rows.min_p, rows.seeds, rows.positions
            ),
        )
    drawn = rows.temperature >= _GREEDY_BELOW
    heat = torch.where(drawn, rows.temperature, torch.ones_like(rows.temperature))
    scores = _cut(logits.float() / heat[:, None], rows)
    ids = torch.arange(logits.shape[1], device=logits.device)[None]
    times = torch.softmax(scores, dim=-1) / exponential(rows.seeds, rows.positions, ids)
    return torch.where(drawn, times.argmax(-1), logits.argmax(-1))


def _cut(scores: Tensor, rows: RowSampling) -> Tensor:
    """Cut by top-k, then top-p, then min-p, as executor/truncation.py does."""
    vocabulary = scores.shape[1]
    ordered = scores.sort(dim=-1).values
    none = (rows.top_k <= 0) | (rows.top_k >= vocabulary)
    first = torch.where(none, torch.zeros_like(rows.top_k), vocabulary - rows.top_k)
    ordered = ordered.masked_fill(ordered < ordered.gather(1, first.long()[:, None]), _OUT)
    # Without top-p no cumulative probability is as low as the bound.
    bounds = torch.where(rows.top_p < 1, 1 - rows.top_p, torch.full_like(rows.top_p, -1.0))
    removed = torch.softmax(ordered, dim=-1).cumsum(-1) <= bounds[:, None]
    removed |= ordered == _OUT
    removed[:, -1] = False
    least = ordered.gather(1, removed.sum(-1, keepdim=True))
    scores = scores.masked_fill(scores < least, _OUT)
    probabilities = torch.softmax(scores, dim=-1)
    limit = rows.min_p[:, None] * probabilities.amax(-1, keepdim=True)
    return scores.masked_fill(probabilities < limit, _OUT)
