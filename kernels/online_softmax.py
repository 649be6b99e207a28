"""Attention of some rows to keys that come part by part, in any order.

For each row and head it keeps the highest score so far, and sums of what was seen relative to that
(Milakov and Gimelshein, 2018):

    sum  = Σ exp(score - highest)        mixed = Σ exp(score - highest) × value

A part with a higher score first scales both down. Sums are kept in float32.
"""

import torch
from torch import Tensor

from baton.kernels.attention_mask import additive, beyond
from baton.kernels.attention_scores import Scoring

# Scores that may be in memory at a time.
_SCORES = 1 << 24


class OnlineAttention:
    """Consecutive query rows of one sequence, and what they have seen so far."""

    def __init__(self, q: Tensor, first: int, window: int | None, scoring: Scoring) -> None:
        """Take q [rows, heads, head_dim]; its first row is the token at position `first`."""
        self._q = q.transpose(0, 1).float()
        self._dtype = q.dtype
        self._first = first
        self._window = window
        self._scoring = scoring
        heads, rows, _ = self._q.shape
        self._highest = self._q.new_full((heads, rows, 1), float("-inf"))
        self._sum = torch.zeros_like(self._highest)
        self._mixed = torch.zeros_like(self._q)

    def __repr__(self) -> str:
        rows = self._q.shape[1]
        return f"<OnlineAttention of positions {self._first} to {self._first + rows - 1}>"

    def add(self, k: Tensor, v: Tensor, first: int) -> None:
        """See keys and values [kv_heads, keys, head_dim] of positions from `first` on.

        Rows see what is not after them and within the window. Every key is seen once.
        """
        heads, rows, _ = self._q.shape
        step = max(1, _SCORES // (heads * max(1, k.shape[1])))
        for row in range(0, rows, step):
            tile = slice(row, min(row + step, rows))
            lowest, highest = self._first + tile.start, self._first + tile.stop - 1
            start = 0 if self._window is None else max(0, lowest + 1 - self._window - first)
            keys = slice(start, min(k.shape[1], highest + 1 - first))
            if keys.start < keys.stop:
                self._see(tile, k[:, keys].float(), v[:, keys].float(), first + keys.start)

    def _see(self, tile: slice, k: Tensor, v: Tensor, first: int) -> None:
        scores = self._scores(tile, k, first)
        before = self._highest[:, tile]
        highest = torch.maximum(before, scores.amax(-1, keepdim=True))
        # A row that has seen nothing yet has sums of 0, and needs a number to subtract.
        level = highest.clamp(min=torch.finfo(highest.dtype).min)
        shares = scores.sub_(level).exp_()
        kept = (before - level).exp_()
        self._sum[:, tile] = self._sum[:, tile] * kept + shares.sum(-1, keepdim=True)
        grouped = shares.view(k.shape[0], -1, k.shape[1])
        mixed = torch.matmul(grouped, v).view(self._mixed[:, tile].shape)
        self._mixed[:, tile] = self._mixed[:, tile] * kept + mixed
        self._highest[:, tile] = highest

    def _scores(self, tile: slice, k: Tensor, first: int) -> Tensor:
        """Return [heads, rows, keys], -inf where a row does not see a key."""
        q, scoring = self._q[:, tile], self._scoring
        heads, rows, dims = q.shape
        grouped = (q * scoring.scale).reshape(k.shape[0], -1, dims)
        scores = torch.matmul(grouped, k.transpose(-1, -2)).view(heads, rows, -1)
        if scoring.softcap is not None:
            scores.div_(scoring.softcap).tanh_().mul_(scoring.softcap)
        row = torch.arange(rows, device=q.device)[:, None] + (self._first + tile.start)
        distance = row - (torch.arange(k.shape[1], device=q.device) + first)
        return scores.add_(additive(beyond(distance, self._window), scores.dtype))

    def result(self) -> Tensor:
        """Return the attention output [rows, heads, head_dim]; each row has seen a key at least."""
        total = self._sum
        if self._scoring.sinks is not None:
            sinks = self._scoring.sinks.float().view(-1, 1, 1)
            total = total + (sinks - self._highest).exp()
        return (self._mixed / total).transpose(0, 1).to(self._dtype)
