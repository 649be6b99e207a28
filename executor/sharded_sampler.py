"""Chooses the next tokens where each rank has the logits of some tokens of the vocabulary.

It gives the tokens that executor/sampler.py gives, on every rank of the group. Logits change where
they are. Then one exchange carries, for each row,

    greedy              each rank's best token
    temperature alone   the winner of each rank's exponential race: the winner of all is among them
    top-k, top-p, min-p each rank's likeliest tokens (executor/candidates.py)

and only the rows that this cannot decide (typical-p, a cut that keeps more tokens than were sent,
logprobs) are gathered whole.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from baton.core.ids import SeqId
from baton.core.request import SamplingParams, TokenLogprobs
from baton.executor.batch import SampledRow
from baton.executor.candidates import Candidates
from baton.executor.grammar_mask import NO_MASKS, GrammarMask
from baton.executor.history import Histories
from baton.executor.logit_changes import change_logits_
from baton.executor.logprobs import RawLogprobs
from baton.executor.noise import race
from baton.executor.sampler import draw, is_greedy
from baton.parallel.group import Group
from baton.parallel.split import sizes, uneven

CANDIDATES = 128
"""Tokens of a row that a rank sends at most; a top-k of more gathers the row."""


class ShardedSampler:
    """Samples step after step, together with the other ranks of a tensor-parallel group."""

    def __init__(self, tp: Group, vocabulary: int, depth: int = 1) -> None:
        """`vocabulary` is the number of all tokens; ranks have them as parallel/split.py says.

        `depth` is how many steps may be under way at once.
        """
        self._tp = tp
        self._vocabulary = vocabulary
        self._own = uneven(vocabulary, tp.rank, tp.size)
        self._histories = Histories(depth)

    def __repr__(self) -> str:
        own = self._own
        return f"<ShardedSampler of tokens {own.start} to {own.stop - 1}, {self._tp}>"

    def step(
        self,
        logits: Tensor,
        rows: Sequence[SampledRow],
        masks: Mapping[SeqId, GrammarMask] = NO_MASKS,
    ) -> tuple[list[int], dict[SeqId, TokenLogprobs]]:
        """Return each row's token, and the logprobs that were asked for, on all ranks alike.

        `logits` are float32 [rows, the rank's tokens] and may be changed. `masks` are what grammars
        allow, of all tokens.
        """
        if not rows:
            return [], {}
        special = {i: row for i, row in enumerate(rows) if row.context is not None}
        raw = RawLogprobs(logits, special, self._whole)
        histories = self._histories.advance(special.values())
        change_logits_(logits, special, histories, self._own.start, masks)
        tokens = self.sample(logits, [r.sampling for r in rows], [r.position for r in rows])
        return tokens, raw.told(tokens)

    def sample(
        self, logits: Tensor, params: Sequence[SamplingParams], positions: Sequence[int]
    ) -> list[int]:
        """Return one token per row of float32 logits [rows, the rank's tokens]."""
        wanted = [self._wanted(p) for p in params]
        one, many = ([i for i, n in enumerate(wanted) if n == m] for m in (1, CANDIDATES))
        gathered = self._exchange(
            self._best(logits, params, positions, one), self._likeliest(logits, params, many)
        )
        tokens = dict(zip(one, _winners(gathered[0], params, positions, one), strict=True))
        whole = [i for i, n in enumerate(wanted) if not n]
        if many:
            chosen, places = [params[i] for i in many], [positions[i] for i in many]
            found, complete = _candidates(gathered[1]).draw(chosen, places)
            for i, token, right in zip(many, found.tolist(), complete.tolist(), strict=True):
                tokens[i] = token
                whole += [] if right else [i]
        if whole:
            rows = self._whole(logits[torch.tensor(whole, device=logits.device)])
            drawn = draw(rows, [params[i] for i in whole], [positions[i] for i in whole])
            tokens |= zip(whole, drawn.tolist(), strict=True)
        return [tokens[i] for i in range(len(params))]

    def _wanted(self, params: SamplingParams) -> int:
        """Return how many tokens of a row each rank sends; 0 for the whole row."""
        if is_greedy(params):
            return 1
        cuts_k = 0 < params.top_k < self._vocabulary
        if params.typical_p < 1 or (cuts_k and params.top_k > CANDIDATES):
            return 0
        return CANDIDATES if cuts_k or params.top_p < 1 or params.min_p > 0 else 1

    def _best(
        self,
        logits: Tensor,
        params: Sequence[SamplingParams],
        positions: Sequence[int],
        rows: Sequence[int],
    ) -> Tensor:
        """Return (score, token) [rows, 2] of this rank's best token in each of `rows`."""
        chosen = [params[i] for i in rows]
        scores = _scores(logits, chosen, rows)
        best = scores.argmax(-1)
        if drawn := [i for i, p in enumerate(chosen) if not is_greedy(p)]:
            index = torch.tensor(drawn, device=logits.device)
            own = torch.arange(self._own.start, self._own.stop, device=logits.device)[None]
            places = [positions[rows[i]] for i in drawn]
            rates = torch.softmax(scores[index], dim=-1)
            best[index] = race(rates, own, [chosen[i] for i in drawn], places)
        score = scores.gather(1, best[:, None])
        return torch.cat([score.double(), (best[:, None] + self._own.start).double()], dim=1)

    def _likeliest(
        self, logits: Tensor, params: Sequence[SamplingParams], rows: Sequence[int]
    ) -> Tensor:
        """Return [rows, 2 × CANDIDATES + 2]: scores, tokens, what is kept back, the mass."""
        scores = _scores(logits, [params[i] for i in rows], rows)
        count = min(CANDIDATES, scores.shape[1])
        top = scores.topk(count, dim=-1)
        sent = scores.new_full((2, len(rows), CANDIDATES), float("-inf"), dtype=torch.float64)
        sent[1] = 0
        sent[0, :, :count] = top.values
        sent[1, :, :count] = top.indices + self._own.start
        kept_back = top.values[:, -1:].double()
        if count == scores.shape[1]:
            kept_back = torch.full_like(kept_back, float("-inf"))
        mass = scores.logsumexp(-1, keepdim=True).double()
        return torch.cat([sent[0], sent[1], kept_back, mass], dim=1)

    def _exchange(self, *parts: Tensor) -> list[Tensor]:
        """Return all ranks' parts [ranks, rows, n], in float64: it holds every token exactly."""
        together = self._tp.all_gather(torch.cat([part.flatten() for part in parts])[None])
        pieces = torch.split(together, [part.numel() for part in parts], dim=1)
        shapes = [(self._tp.size, *part.shape) for part in parts]
        return [piece.reshape(shape) for piece, shape in zip(pieces, shapes, strict=True)]

    def _whole(self, logits: Tensor) -> Tensor:
        return whole_rows(logits, self._tp, self._vocabulary)


def whole_rows(logits: Tensor, tp: Group, vocabulary: int) -> Tensor:
    """Return rows [rows, vocabulary] of which each rank has its tokens; nothing waits for them."""
    rows = sizes(vocabulary, tp.size)
    return tp.all_gather(logits.T.contiguous(), rows).T.contiguous()


def _scores(logits: Tensor, params: Sequence[SamplingParams], rows: Sequence[int]) -> Tensor:
    """Return rows of logits after temperature; those of greedy rows as they are."""
    index = torch.tensor(rows, dtype=torch.int64, device=logits.device)
    heat = [1.0 if is_greedy(p) else p.temperature for p in params]
    return logits[index] / torch.tensor(heat, device=logits.device)[:, None]


def _winners(
    gathered: Tensor,
    params: Sequence[SamplingParams],
    positions: Sequence[int],
    rows: Sequence[int],
) -> list[int]:
    """Return the best of every rank's (score, token) [ranks, rows, 2]; of equals the first."""
    scores, tokens = gathered[..., 0].T.float(), gathered[..., 1].T.long()
    best = scores.argmax(-1)
    if drawn := [i for i, row in enumerate(rows) if not is_greedy(params[row])]:
        index = torch.tensor(drawn, device=gathered.device)
        chosen, places = [params[rows[i]] for i in drawn], [positions[rows[i]] for i in drawn]
        rates = torch.softmax(scores[index], dim=-1)
        best[index] = race(rates, tokens[index], chosen, places)
    found: list[int] = tokens.gather(1, best[:, None])[:, 0].tolist()
    return found


def _candidates(gathered: Tensor) -> Candidates:
    """Return all ranks' likeliest tokens [ranks, rows, 2 × CANDIDATES + 2] in falling order."""
    rows = gathered.shape[1]
    widths = [CANDIDATES, CANDIDATES, 1, 1]
    scores, tokens, kept_back, mass = torch.split(gathered, widths, dim=-1)
    ordered = scores.transpose(0, 1).reshape(rows, -1).float().sort(-1, descending=True)
    found = tokens.transpose(0, 1).reshape(rows, -1).long().gather(1, ordered.indices)
    return Candidates(ordered.values, found, kept_back.amax(0).float(), mass.float().logsumexp(0))
