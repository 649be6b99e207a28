"""Logprobs are those of the model's own distribution, whatever sampling makes of it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from baton.core.ids import SeqId
from baton.core.request import SamplingParams, TokenLogprobs
from baton.engine.step import SamplingContext, ScheduledSequence, StepPlan
from baton.executor.batch import SampledRow
from baton.executor.sampler import Sampler

VOCABULARY = 50


def row_of(params: SamplingParams, seq: int) -> SampledRow:
    context = None if params.plain else SamplingContext(2, (0,), (1,))
    return SampledRow(SeqId(seq), 2, params, (2,), context)


CASES = [
    SamplingParams(logprobs=0),
    SamplingParams(),
    SamplingParams(temperature=0.0, logprobs=3),
    SamplingParams(temperature=0.1, top_k=2, logprobs=20),
    SamplingParams(logit_bias=((7, 100.0),), logprobs=1),
    SamplingParams(repetition_penalty=50.0, bad_words=((3,),), min_tokens=5, logprobs=VOCABULARY),
    SamplingParams(presence_penalty=2.0),
]


def assert_told(found: TokenLogprobs, token: int, row: torch.Tensor, count: int) -> None:
    expected = row.double().log_softmax(-1)
    assert found.logprob == pytest.approx(expected[token].item(), abs=1e-5)
    likeliest = expected.argsort(descending=True)[:count].tolist()
    assert [id_ for id_, _ in found.top] == likeliest
    assert [value for _, value in found.top] == pytest.approx(
        expected[likeliest].tolist(), abs=1e-5
    )


def test_each_row_tells_what_it_asked_for_before_any_change() -> None:
    logits = torch.randn(len(CASES), VOCABULARY, generator=torch.Generator().manual_seed(1)) * 3
    rows = [row_of(params, i) for i, params in enumerate(CASES)]
    tokens, told = Sampler().step(logits.clone(), rows)
    assert tokens[4] == 7
    assert told.keys() == {SeqId(i) for i, p in enumerate(CASES) if p.logprobs is not None}
    for seq_id, found in told.items():
        assert_told(found, tokens[seq_id], logits[seq_id], CASES[seq_id].logprobs or 0)


def test_a_token_is_the_same_whether_or_not_logprobs_are_told() -> None:
    logits = torch.randn(len(CASES), VOCABULARY, generator=torch.Generator().manual_seed(2)) * 3
    with_logprobs = [row_of(replace(p, seed=i), i) for i, p in enumerate(CASES)]
    without = [row_of(replace(p, seed=i, logprobs=None), i) for i, p in enumerate(CASES)]
    tokens, _ = Sampler().step(logits.clone(), with_logprobs)
    assert Sampler().step(logits.clone(), without) == (tokens, {})


def test_a_step_that_samples_nothing_tells_nothing() -> None:
    assert Sampler().step(torch.empty(0, VOCABULARY), []) == ([], {})


def generate(driver: Any, prompt: Sequence[int], params: SamplingParams, count: int) -> Any:
    """Generate alone, as a scheduler would plan it; return tokens and logprobs."""
    track = driver.add(prompt, count, params)
    told: list[TokenLogprobs] = []
    while len(track.tokens) < track.wanted:
        new = tuple(track.tokens[track.computed :])
        context = SamplingContext(len(prompt), (), () if not track.computed else None)
        part = ScheduledSequence(SeqId(0), new, track.computed, track.blocks, True, params, context)
        result = driver.runner.execute(StepPlan(len(told), (part,)))
        track.computed = part.end
        track.tokens.append(result.tokens[SeqId(0)])
        told.append(result.logprobs[SeqId(0)])
    return track.tokens[len(prompt) :], told


def test_logprobs_are_transformers_log_softmax(
    model: Any, reference: Any, make_driver: Any
) -> None:
    params = SamplingParams(
        seed=3, temperature=0.8, repetition_penalty=1.2, frequency_penalty=0.5, logprobs=5
    )
    prompt = reference.prompts[3]
    tokens, told = generate(make_driver(model), prompt, params, 24)
    rows = reference.logits([*prompt, *tokens])[len(prompt) - 1 :].log_softmax(-1)
    for token, found, row in zip(tokens, told, rows, strict=False):
        assert found.logprob == pytest.approx(row[token].item(), abs=2e-4)
        best = row.topk(5).values.tolist()
        assert [value for _, value in found.top] == pytest.approx(best, abs=2e-4)
        assert [row[id_].item() for id_, _ in found.top] == pytest.approx(best, abs=2e-4)
