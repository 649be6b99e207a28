"""Cuts and draws among the likeliest tokens of every shard of the vocabulary, as if among all.

Each rank sends its likeliest tokens in falling order, and what all its tokens weigh together. The
tokens that it keeps back are no likelier than the last one it sends:

    rank 0   9.1  8.7  6.0  5.9 │ at most 5.9            kept: what is over the cut's threshold
    rank 1   8.9  3.1  3.0  1.2 │ at most 1.2            known: everything over 5.9

As long as the threshold is over what ranks keep back, nothing is missing, ties included. Otherwise
the row is not `complete`, and only its whole logits can tell.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from baton.core.request import SamplingParams
from baton.executor.noise import race

_OUT = float("-inf")


@dataclass(frozen=True, slots=True)
class Candidates:
    """Tokens after temperature, per row in falling order."""

    scores: Tensor
    """[rows, candidates] float32; -inf where a rank has no more tokens."""
    tokens: Tensor
    """[rows, candidates] int64"""
    kept_back: Tensor
    """[rows, 1]: no other token has a score over this."""
    mass: Tensor
    """[rows, 1]: the logarithm of the sum of exp(score) over all tokens."""

    def draw(
        self, params: Sequence[SamplingParams], positions: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Return a token [rows] for each row and whether it is right [rows] (bool).

        It is the token that executor/sampler.py draws from all logits, cut by top-k, top-p and
        min-p.
        """
        threshold, complete = self._thresholds(params)
        rates = torch.softmax(self.scores.masked_fill(self.scores < threshold, _OUT), dim=-1)
        winner = race(rates, self.tokens, params, positions)
        return self.tokens.gather(1, winner[:, None])[:, 0], complete

    def _thresholds(self, params: Sequence[SamplingParams]) -> tuple[Tensor, Tensor]:
        """Return the lowest score [rows, 1] that is not cut, and whether it is known [rows]."""
        scores, device = self.scores, self.scores.device
        count = scores.shape[1]
        ks = torch.tensor([p.top_k for p in params], device=device)[:, None]
        cut = (ks > 0) & (ks <= count)
        kth = scores.gather(1, ks.clamp(1, count) - 1)
        by_k = torch.where(cut, kth, _OUT)
        known = ~cut | (kth > self.kept_back)
        left = scores.masked_fill(scores < by_k, _OUT)
        mass = torch.where(cut, left.logsumexp(-1, keepdim=True), self.mass)
        shares = (left - mass).exp()
        ps = torch.tensor([p.top_p for p in params], device=device)[:, None]
        inside = (shares.cumsum(-1) - shares < ps).sum(-1, keepdim=True).clamp_(min=1)
        by_p = torch.where(ps < 1, scores.gather(1, inside - 1), _OUT)
        least = torch.tensor([p.min_p for p in params], device=device)[:, None]
        by_min = scores[:, :1] + least.log()
        threshold = torch.maximum(torch.maximum(by_k, by_p), by_min)
        return threshold, (known & (threshold > self.kept_back))[:, 0]
