"""Penalties, bias, bad words and min tokens are what transformers and vLLM define."""

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from baton.core.ids import SeqId
from baton.core.request import SamplingParams
from baton.engine.step import SamplingContext
from baton.executor.batch import SampledRow
from baton.executor.history import Histories
from baton.executor.logit_changes import change_logits_
from baton.executor.sampler import Sampler, sample

VOCABULARY = 61
STOP = (3, 17)


def row_of(params: SamplingParams, tokens: Sequence[int], prompt_len: int, seq: int) -> SampledRow:
    """A sequence that computes its last token in this step, and was not in the step before."""
    before, last = tuple(tokens[:-1]), tuple(tokens[-1:])
    context = SamplingContext(prompt_len, STOP, before if params.looks_back else None)
    return SampledRow(SeqId(seq), len(tokens), params, last, None if params.plain else context)


def changed(logits: Tensor, rows: Sequence[SampledRow]) -> Tensor:
    logits = logits.clone()
    special = {i: row for i, row in enumerate(rows) if row.context is not None}
    change_logits_(logits, special, Histories().advance(rows))
    return logits


def as_published(
    row: Tensor, params: SamplingParams, tokens: Sequence[int], prompt_len: int
) -> Tensor:
    """One row [1, vocabulary] changed by transformers' processors, and by vLLM's definition.

    vLLM publishes its penalties so: the repetition penalty divides positive and multiplies other
    logits of every token in prompt or output; then logits -= frequency * count in the output, and
    logits -= presence * (count > 0).
    """
    ids = torch.tensor([list(tokens)])
    if params.bad_words:
        words = [list(word) for word in params.bad_words]
        row = NoBadWordsLogitsProcessor(words)(ids, row)
    if params.min_tokens:
        processor = MinNewTokensLengthLogitsProcessor(
            prompt_len, params.min_tokens, list(STOP), device="cpu"
        )
        row = processor(ids, row)
    if params.logit_bias:
        row = SequenceBiasLogitsProcessor({(t,): b for t, b in params.logit_bias})(ids, row)
    if params.repetition_penalty != 1:
        row = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(ids, row)
    output = torch.tensor(list(tokens[prompt_len:]), dtype=torch.int64)
    counts = torch.bincount(output, minlength=VOCABULARY)[None]
    row = row - params.frequency_penalty * counts
    return row - params.presence_penalty * (counts > 0)


CASES = [
    SamplingParams(),
    SamplingParams(repetition_penalty=1.3),
    SamplingParams(repetition_penalty=0.5),
    SamplingParams(presence_penalty=1.5),
    SamplingParams(presence_penalty=-2.0),
    SamplingParams(frequency_penalty=0.7),
    SamplingParams(repetition_penalty=1.2, presence_penalty=0.3, frequency_penalty=-0.4),
    SamplingParams(logit_bias=((0, 100.0), (5, -100.0), (60, 0.25))),
    SamplingParams(bad_words=((9,), (11,))),
    SamplingParams(bad_words=((1, 2), (2, 3, 4), (7, 7))),
    SamplingParams(min_tokens=8),
    SamplingParams(
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=0.3,
        logit_bias=((1, 3.0), (9, 5.0), (3, 50.0)),
        bad_words=((9,), (4, 1)),
        min_tokens=8,
    ),
]


def batch(seed: int, params: Sequence[SamplingParams]) -> tuple[Tensor, list[SampledRow], Tensor]:
    """Logits, rows, and what each row must become alone."""
    draw = random.Random(seed)
    logits = torch.randn(
        len(params), VOCABULARY, generator=torch.Generator().manual_seed(seed)
    ).mul_(4)
    rows, expected = [], []
    for i, p in enumerate(params):
        prompt_len = draw.randrange(4, 20)
        tokens = [draw.randrange(12) for _ in range(prompt_len + draw.randrange(12))]
        rows.append(row_of(p, tokens, prompt_len, i))
        expected.append(as_published(logits[i : i + 1], p, tokens, prompt_len))
    return logits, rows, torch.cat(expected)


@pytest.mark.parametrize("seed", range(4))
def test_every_row_is_changed_as_published(seed: int) -> None:
    logits, rows, expected = batch(seed, CASES)
    found = changed(logits, rows)
    assert torch.equal(found.isinf(), expected.isinf())
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(found[0], logits[0]), "a plain row stays as it is, bit by bit"


@pytest.mark.parametrize(
    ("tokens", "forbidden"),
    [([5, 1], [2]), ([1, 5], []), ([2, 3], [4]), ([3], []), ([5, 7], [7]), ([1, 7], [7])],
)
def test_a_bad_word_is_forbidden_where_it_would_be_complete(
    tokens: list[int], forbidden: list[int]
) -> None:
    """Also where it has begun in the prompt."""
    params = SamplingParams(bad_words=((1, 2), (2, 3, 4), (7, 7)))
    for prompt_len in (1, len(tokens)):
        row = row_of(params, tokens, prompt_len, 0)
        found = changed(torch.zeros(1, VOCABULARY), [row])
        assert found[0].isinf().nonzero().flatten().tolist() == forbidden


def test_stop_tokens_are_forbidden_until_there_are_enough() -> None:
    params = SamplingParams(min_tokens=3)
    for generated in range(6):
        row = row_of(params, [1] * (4 + generated), 4, 0)
        found = changed(torch.zeros(1, VOCABULARY), [row])[0].isinf().nonzero().flatten().tolist()
        assert found == (list(STOP) if generated < 3 else [])


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 2**31),
    st.floats(0.01, 100),
    st.floats(-2, 2),
    st.floats(-2, 2),
    st.dictionaries(st.integers(0, VOCABULARY - 1), st.floats(-100, 100), max_size=9),
    st.lists(st.lists(st.integers(0, 11), min_size=1, max_size=3).map(tuple), max_size=9),
    st.integers(0, 14),
)
def test_changed_as_published_anywhere(
    seed: int,
    repetition: float,
    presence: float,
    frequency: float,
    bias: dict[int, float],
    words: list[tuple[int, ...]],
    min_tokens: int,
) -> None:
    params = SamplingParams(
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
        logit_bias=tuple(bias.items()),
        bad_words=tuple(dict.fromkeys(words)),
        min_tokens=min_tokens,
    )
    logits, rows, expected = batch(seed, [params, SamplingParams(), params])
    found = changed(logits, rows)
    assert torch.equal(found.isinf(), expected.isinf())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_same_row_is_changed_alike_in_any_batch() -> None:
    logits, rows, _ = batch(7, CASES)
    together = changed(logits, rows)
    for i, row in enumerate(rows):
        assert torch.equal(changed(logits[i : i + 1], [row])[0], together[i])


def test_what_is_kept_from_step_to_step_changes_nothing() -> None:
    """A sampler that follows the sequences, against one that is told everything each time."""
    generator = torch.Generator().manual_seed(3)
    following, tokens = Sampler(), [[5, 4, 5, 1] * 3 for _ in CASES]
    seeded = [replace(p, seed=i, temperature=1.5 * (i % 3)) for i, p in enumerate(CASES)]
    for step in range(40):
        logits = torch.randn(len(CASES), VOCABULARY, generator=generator) * 3
        rows = [row_of(p, t, 12, i) for i, (p, t) in enumerate(zip(seeded, tokens, strict=True))]
        fresh, _ = Sampler().step(logits.clone(), rows)
        if step:
            rows = [
                replace(r, context=replace(r.context, before=None)) if r.context else r
                for r in rows
            ]
        found, _ = following.step(logits.clone(), rows)
        assert found == fresh
        for sequence, token in zip(tokens, found, strict=True):
            sequence.append(token)
    assert len(following._histories) == sum(p.looks_back for p in CASES)


def test_a_penalised_distribution_is_drawn_as_often_as_it_is_likely() -> None:
    params = SamplingParams(
        seed=9,
        repetition_penalty=1.4,
        frequency_penalty=0.5,
        logit_bias=((2, 2.0),),
        bad_words=((0,), (1, 3)),
    )
    logits, [row], expected = batch(11, [params])
    probabilities = expected.softmax(-1)[0].double().numpy()
    count = 20_000
    scores = changed(logits, [row]).expand(count, -1)
    tokens = sample(scores, [params] * count, range(count))
    counts = np.bincount(tokens, minlength=VOCABULARY)
    assert counts[0] == 0
    likely = probabilities * count >= 10
    cells = probabilities[likely] * count
    chi_square = ((counts[likely] - cells) ** 2 / cells).sum()
    freedom = likely.sum() - 1
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5
