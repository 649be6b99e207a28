"""What the user asks to be more or less likely: changes of logits before temperature.

In vLLM's order: bad words and, before `min_tokens`, stop tokens are made impossible; then come the
bias, the repetition penalty, the frequency penalty and the presence penalty. Impossible tokens
stay so. All rows are changed at once, and of a row only the tokens that are concerned.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from baton.core.ids import SeqId
from baton.core.request import SamplingParams
from baton.executor.batch import SampledRow
from baton.executor.history import History


def change_logits_(
    logits: Tensor, rows: Mapping[int, SampledRow], histories: Mapping[SeqId, History]
) -> None:
    """Change float32 logits [rows, vocabulary] in place, each row as its parameters say.

    `rows` has by its index every row with a context, `histories` every one that looks back.
    """
    if rows:
        _forbid_(logits, rows, histories)
        _bias_(logits, rows)
        _penalise_(logits, rows, histories)


def _forbid_(
    logits: Tensor, rows: Mapping[int, SampledRow], histories: Mapping[SeqId, History]
) -> None:
    indices: list[int] = []
    tokens: list[int] = []
    for i, row in rows.items():
        history = histories.get(row.seq_id)
        for token in _forbidden(row, [] if history is None else history.tokens):
            indices.append(i)
            tokens.append(token)
    if indices:
        where = torch.tensor([indices, tokens], device=logits.device)
        logits[where[0], where[1]] = float("-inf")


def _forbidden(row: SampledRow, before: list[int]) -> Iterator[int]:
    """Yield the tokens that may not come next."""
    for word in row.sampling.bad_words:
        begun = len(word) - 1
        if not begun or tuple(before[-begun:]) == word[:-1]:
            yield word[-1]
    assert row.context is not None
    if row.position - row.context.prompt_len < row.sampling.min_tokens:
        yield from row.context.stop_token_ids


def _bias_(logits: Tensor, rows: Mapping[int, SampledRow]) -> None:
    biased = [
        (i, token, bias) for i, row in rows.items() for token, bias in row.sampling.logit_bias
    ]
    if biased:
        indices, tokens, values = zip(*biased, strict=True)
        where = torch.tensor([indices, tokens], device=logits.device)
        logits[where[0], where[1]] += torch.tensor(values, device=logits.device)


def _penalise_(
    logits: Tensor, rows: Mapping[int, SampledRow], histories: Mapping[SeqId, History]
) -> None:
    """Change the logits of all tokens that were said; they are looked up once for all rows."""
    said = [
        (i, row.sampling, histories[row.seq_id])
        for i, row in rows.items()
        if row.sampling.penalises
    ]
    if not said:
        return
    device = logits.device
    sizes = [len(history.ids) for _, _, history in said]
    indices = torch.from_numpy(np.repeat([i for i, _, _ in said], sizes)).to(device)
    tokens = torch.from_numpy(np.concatenate([h.ids for _, _, h in said])).to(device)
    counts = torch.from_numpy(np.concatenate([h.counts for _, _, h in said])).to(device)

    def each(values: Sequence[float]) -> Tensor:
        return torch.from_numpy(np.repeat(np.array(values, dtype=np.float32), sizes)).to(device)

    params: list[SamplingParams] = [p for _, p, _ in said]
    repetition = each([p.repetition_penalty for p in params])
    found = logits[indices, tokens]
    found = torch.where(found > 0, found / repetition, found * repetition)
    found -= each([p.frequency_penalty for p in params]) * counts
    found -= each([p.presence_penalty for p in params]) * (counts > 0)
    logits[indices, tokens] = found
