"""What the user asks to be more or less likely: changes of logits before temperature.

In vLLM's order: bad words and, before `min_tokens`, stop tokens are made impossible, and so is what
a grammar does not allow; then come the bias, the repetition penalty, the frequency penalty and the
presence penalty. Impossible tokens stay so. All rows are changed at once, and of a row only the
tokens that are concerned.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from baton.core.ids import SeqId
from baton.core.request import SamplingParams
from baton.executor.batch import SampledRow
from baton.executor.grammar_mask import NO_MASKS, GrammarMask
from baton.executor.history import History

_OUT = float("-inf")


def change_logits_(
    logits: Tensor,
    rows: Mapping[int, SampledRow],
    histories: Mapping[SeqId, History],
    first: int = 0,
    masks: Mapping[SeqId, GrammarMask] = NO_MASKS,
) -> None:
    """Change float32 logits [rows, tokens] in place, each row as its parameters say.

    The columns are the tokens from `first` on: all of the vocabulary, or a rank's part of it.
    `rows` has by its index every row with a context, `histories` every one that recalls tokens,
    and `masks` every one with a grammar that can be followed.
    """
    if rows:
        _forbid_(logits, rows, histories, first, masks)
        _bias_(logits, rows, first)
        _penalise_(logits, rows, histories, first)


def _forbid_(
    logits: Tensor,
    rows: Mapping[int, SampledRow],
    histories: Mapping[SeqId, History],
    first: int,
    masks: Mapping[SeqId, GrammarMask],
) -> None:
    own = range(first, first + logits.shape[1])
    indices: list[int] = []
    tokens: list[int] = []
    for i, row in rows.items():
        history = histories.get(row.seq_id)
        forbidden = _forbidden(row, [] if history is None else history.tokens)
        if row.seq_id in masks:
            assert row.context is not None
            mask = masks[row.seq_id].allowed(forbidden, row.context.stop_token_ids)
            allowed = torch.from_numpy(mask[own.start : own.stop]).to(logits.device)
            logits[i].masked_fill_(~allowed, _OUT)
            continue
        for token in forbidden:
            if token in own:
                indices.append(i)
                tokens.append(token - first)
    if indices:
        where = torch.tensor([indices, tokens], device=logits.device)
        logits[where[0], where[1]] = _OUT


def _forbidden(row: SampledRow, before: list[int]) -> Iterator[int]:
    """Yield the tokens that may not come next."""
    for word in row.sampling.bad_words:
        begun = len(word) - 1
        if not begun or tuple(before[-begun:]) == word[:-1]:
            yield word[-1]
    assert row.context is not None
    if row.position - row.context.prompt_len < row.sampling.min_tokens:
        yield from row.context.stop_token_ids


def _bias_(logits: Tensor, rows: Mapping[int, SampledRow], first: int) -> None:
    own = range(first, first + logits.shape[1])
    biased = [
        (i, token - first, bias)
        for i, row in rows.items()
        for token, bias in row.sampling.logit_bias
        if token in own
    ]
    if biased:
        indices, tokens, values = zip(*biased, strict=True)
        where = torch.tensor([indices, tokens], device=logits.device)
        logits[where[0], where[1]] += torch.tensor(values, device=logits.device)


def _penalise_(
    logits: Tensor,
    rows: Mapping[int, SampledRow],
    histories: Mapping[SeqId, History],
    first: int,
) -> None:
    """Change the logits of all tokens that were said; they are looked up once for all rows."""
    said = [
        (i, row.sampling, *_own_part(histories[row.seq_id], first, logits.shape[1]))
        for i, row in rows.items()
        if row.sampling.penalises
    ]
    if not said:
        return
    device = logits.device
    sizes = [len(ids) for _, _, ids, _ in said]
    indices = torch.from_numpy(np.repeat([i for i, _, _, _ in said], sizes)).to(device)
    tokens = torch.from_numpy(np.concatenate([ids for _, _, ids, _ in said])).to(device)
    counts = torch.from_numpy(np.concatenate([often for _, _, _, often in said])).to(device)

    def each(values: Sequence[float]) -> Tensor:
        return torch.from_numpy(np.repeat(np.array(values, dtype=np.float32), sizes)).to(device)

    params: list[SamplingParams] = [p for _, p, _, _ in said]
    repetition = each([p.repetition_penalty for p in params])
    found = logits[indices, tokens]
    found = torch.where(found > 0, found / repetition, found * repetition)
    found -= each([p.frequency_penalty for p in params]) * counts
    found -= each([p.presence_penalty for p in params]) * (counts > 0)
    logits[indices, tokens] = found


def _own_part(
    history: History, first: int, count: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the tokens that were said of the `count` from `first` on, from 0, and how often."""
    columns = history.ids - first
    own = (columns >= 0) & (columns < count)
    return columns[own], history.counts[own]
