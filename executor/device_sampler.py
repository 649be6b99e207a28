"""Chooses next tokens where the logits are: all of it tensors, and nothing read on the host.

It computes what executor/sampler.py and logit_changes.py do, but for grammars; the parameters are
tensors, so that a step which was captured serves any sequences. On a GPU it is five Triton kernels
(kernels/triton/sampling.py), elsewhere torch, and so where a row wants typical-p, which sorts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from baton.executor.noise import exponential
from baton.executor.truncation import cut_untypical
from baton.kernels.backend import triton_serves

_GREEDY_BELOW = 1e-5
_OUT = float("-inf")
_SORTED = 16
"""Rows that are sorted at a time: as many take about 64 MiB for a vocabulary of 128k tokens."""


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
    typical_p: Tensor | None = None
    """float32; 1 for none; None if all are"""


@dataclass(frozen=True, slots=True)
class RowPenalties:
    """What rows have said so far, and what that costs them."""

    seen: Tensor
    """[histories + 1, vocabulary] int32: 0, or 1 + how often the token is in the output; the last
    row is written for rows without penalties, and never read"""
    histories: Tensor
    """[rows] int32: the row of `seen`; -1 for rows without penalties"""
    repetition: Tensor
    """[rows] float32, like the next two; 1, 0 and 0 for none"""
    frequency: Tensor
    presence: Tensor


@dataclass(frozen=True, slots=True)
class RowChanges:
    """What is added to single logits, and when; -inf forbids."""

    rows: Tensor
    """[changes] int32; -1 for none"""
    tokens: Tensor
    """[changes] int32"""
    amounts: Tensor
    """[changes] float32"""
    until: Tensor
    """[changes] int64: counts only for tokens at positions before that"""
    after: Tensor
    """[changes, n] int32: counts only where these tokens have just been said; -1 is any"""
    recent: Tensor
    """[rows, n] int32: the last n tokens"""


def begin_history_(seen: Tensor, prompt: Tensor, output: Tensor) -> None:
    """Fill a row of `RowPenalties.seen` [vocabulary] for a sequence that joins the batch.

    `prompt` and `output` are its tokens so far, int64 on the row's device. From then on
    `sample_rows` counts what it chooses.
    """
    seen.zero_()
    seen.scatter_add_(0, output, torch.ones_like(output, dtype=seen.dtype))
    seen += (seen > 0).to(seen.dtype)
    seen.scatter_reduce_(0, prompt, torch.ones_like(prompt, dtype=seen.dtype), reduce="amax")


def change_rows_(logits: Tensor, changes: RowChanges, positions: Tensor) -> None:
    """Change float32 logits [rows, vocabulary] of tokens at `positions` [rows] int64."""
    rows, recent = changes.rows, changes.recent
    if triton_serves(logits):
        from baton.kernels.triton.sampling import LogitChanges, change_logits_

        listed = LogitChanges(rows, changes.tokens, changes.amounts, changes.until, changes.after)
        change_logits_(logits, listed, positions, recent.contiguous())
        return
    own = rows.clamp(min=0).long()
    counts = (rows >= 0) & (positions[own] < changes.until)
    counts &= ((changes.after < 0) | (changes.after == recent[own])).all(-1)
    amounts = changes.amounts.masked_fill(~counts, 0.0)
    logits.index_put_((own, changes.tokens.long()), amounts, accumulate=True)


def sample_rows(logits: Tensor, rows: RowSampling, penalties: RowPenalties | None = None) -> Tensor:
    """Return a token [rows] int64 for each row of logits [rows, vocabulary].

    With penalties, the tokens are counted in `seen`.
    """
    if triton_serves(logits) and rows.typical_p is None:
        return _sample_by_triton(logits, rows, penalties)
    if logits.shape[0] <= _SORTED:
        return _sample_by_torch(logits, rows, penalties)
    parts = range(0, logits.shape[0], _SORTED)
    return torch.cat([_sample_by_torch(*_part(at, logits, rows, penalties)) for at in parts])


def _part(
    start: int, logits: Tensor, rows: RowSampling, penalties: RowPenalties | None
) -> tuple[Tensor, RowSampling, RowPenalties | None]:
    """Return a few rows of each."""
    few = slice(start, start + _SORTED)
    typical_p = None if rows.typical_p is None else rows.typical_p[few]
    own = RowSampling(
        rows.temperature[few],
        rows.top_k[few],
        rows.top_p[few],
        rows.min_p[few],
        rows.seeds[few],
        rows.positions[few],
        typical_p,
    )
    if penalties is None:
        return logits[few], own, None
    p = penalties
    many = (p.histories, p.repetition, p.frequency, p.presence)
    return logits[few], own, RowPenalties(p.seen, *(each[few] for each in many))


def _sample_by_torch(logits: Tensor, rows: RowSampling, penalties: RowPenalties | None) -> Tensor:
    logits = logits.float()
    if penalties is None:
        return _sample(logits, rows)
    none = penalties.seen.shape[0] - 1
    histories = torch.where(penalties.histories < 0, none, penalties.histories.long())
    tokens = _sample(_penalised(logits, penalties, histories), rows)
    times = penalties.seen[histories, tokens]
    penalties.seen[histories, tokens] = times.clamp(min=1) + 1
    return tokens


def _sample_by_triton(logits: Tensor, rows: RowSampling, penalties: RowPenalties | None) -> Tensor:
    from baton.kernels.triton.sampling import Penalties, SamplingTensors, sample

    said = None
    if penalties is not None:
        p = penalties
        said = Penalties(p.seen, p.histories, p.repetition, p.frequency, p.presence)
    params = SamplingTensors(
        rows.temperature, rows.top_k, rows.top_p, rows.min_p, rows.seeds, rows.positions
    )
    return sample(logits, params, said)


def _penalised(logits: Tensor, penalties: RowPenalties, histories: Tensor) -> Tensor:
    """Return logits with penalties for what `histories` [rows] say was said."""
    seen = penalties.seen[histories]
    said = (seen > 0) & (penalties.histories >= 0)[:, None]
    repetition = penalties.repetition[:, None]
    found = torch.where(logits > 0, logits / repetition, logits * repetition)
    found -= penalties.frequency[:, None] * (seen - 1)
    found -= penalties.presence[:, None] * (seen > 1)
    return torch.where(said, found, logits)


def _sample(logits: Tensor, rows: RowSampling) -> Tensor:
    drawn = rows.temperature >= _GREEDY_BELOW
    heat = torch.where(drawn, rows.temperature, torch.ones_like(rows.temperature))
    scores = _cut(logits / heat[:, None], rows)
    ids = torch.arange(logits.shape[1], device=logits.device)[None]
    times = torch.softmax(scores, dim=-1) / exponential(rows.seeds, rows.positions, ids)
    return torch.where(drawn, times.argmax(-1), logits.argmax(-1))


def _cut(scores: Tensor, rows: RowSampling) -> Tensor:
    """Cut by top-k, top-p, min-p and typical-p, in turn, as executor/truncation.py does."""
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
    scores = scores.masked_fill(probabilities < limit, _OUT)
    if rows.typical_p is None:
        return scores
    typical = cut_untypical(scores, rows.typical_p)
    return torch.where((rows.typical_p < 1)[:, None], typical, scores)
