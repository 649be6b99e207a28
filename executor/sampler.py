"""Chooses the next tokens from logits: greedily, or by seeded noise over a truncated distribution.

A row's token depends on that row's logits, parameters, seed, position and, where the parameters
say so, its sequence's tokens before that position; on nothing else.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from baton.core.ids import SeqId
from baton.core.request import SamplingParams, TokenLogprobs
from baton.executor.batch import SampledRow
from baton.executor.grammar_mask import NO_MASKS, GrammarMask
from baton.executor.history import Histories
from baton.executor.logit_changes import change_logits_
from baton.executor.logprobs import RawLogprobs
from baton.executor.noise import race
from baton.executor.truncation import truncated

# Below this, dividing the logits may overflow, and all the mass is on the likeliest token anyway.
_GREEDY_BELOW = 1e-5


class Sampler:
    """Samples step after step; what it keeps in between only saves time (executor/history.py)."""

    def __init__(self, depth: int = 1) -> None:
        """`depth` is how many steps may be under way at once."""
        self._histories = Histories(depth)

    def __repr__(self) -> str:
        return f"<Sampler, {len(self._histories)} histories>"

    def step(
        self,
        logits: Tensor,
        rows: Sequence[SampledRow],
        masks: Mapping[SeqId, GrammarMask] = NO_MASKS,
    ) -> tuple[list[int], dict[SeqId, TokenLogprobs]]:
        """Return each row's token, and the logprobs that were asked for.

        `logits` are float32 [rows, vocabulary] and may be changed. Rows without a context take no
        part in anything but `sample`. `masks` are what grammars allow.
        """
        if not rows:
            return [], {}
        special = {i: row for i, row in enumerate(rows) if row.context is not None}
        raw = RawLogprobs(logits, special)
        histories = self._histories.advance(special.values())
        change_logits_(logits, special, histories, masks=masks)
        tokens = sample(logits, [r.sampling for r in rows], [r.position for r in rows])
        return tokens, raw.told(tokens)


def sample(logits: Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> list[int]:
    """Return one token per row of float32 logits [rows, vocabulary].

    `positions` are those that the new tokens get in their sequences. Only temperature, the cuts
    and the seed of `params` count here.
    """
    assert logits.shape[0] == len(params) == len(positions)
    drawn = [row for row, p in enumerate(params) if not is_greedy(p)]
    if not drawn:
        return logits.argmax(-1).tolist()
    chosen_params = [params[row] for row in drawn]
    rows = torch.tensor(drawn, device=logits.device)
    scores = logits if len(drawn) == len(params) else logits[rows]
    tokens = draw(scores, chosen_params, [positions[row] for row in drawn])
    if len(drawn) == len(params):
        return tokens.tolist()
    return logits.argmax(-1).index_copy_(0, rows, tokens).tolist()


def is_greedy(params: SamplingParams) -> bool:
    """Return whether the likeliest token is taken, without noise."""
    return params.temperature < _GREEDY_BELOW


def draw(logits: Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> Tensor:
    """Return a token [rows] drawn per row; every row's temperature is over 0."""
    tokens = torch.arange(logits.shape[1], device=logits.device)[None]
    return race(torch.softmax(truncated(logits, params), dim=-1), tokens, params, positions)
