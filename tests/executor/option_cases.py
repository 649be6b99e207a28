"""Everything that a request can ask of its sampling, alone and together; for tests of executors."""

from collections.abc import Sequence
from dataclasses import replace

from baton.core.request import GenerateRequest, SamplingParams, TokenLogprobs
from tests.executor.engine_world import EngineWorld, request

STOP = (5, 6)

OFTEN = tuple((token, 30 - 0.4 * token) for token in range(2, 11))
"""Tokens of the prompts come in the output too: who counts those as these is found out."""

OPTIONS = {
    "repetition": SamplingParams(temperature=0.8, seed=1, repetition_penalty=1.4),
    "frequency": SamplingParams(temperature=0.0, frequency_penalty=0.7, logit_bias=OFTEN),
    "presence": SamplingParams(temperature=0.9, seed=2, presence_penalty=1.5, top_k=30),
    "bias": SamplingParams(temperature=0.0, logit_bias=((7, 9.0), (9, -100.0), (11, 9.5))),
    "min tokens": SamplingParams(temperature=0.0, min_tokens=6, logit_bias=((5, 50.0),)),
    "bad words": SamplingParams(temperature=0.0, bad_words=((7,), (3, 4), (8, 9, 10))),
    "logprobs": SamplingParams(temperature=0.7, seed=3, logprobs=0),
    "top logprobs": SamplingParams(temperature=0.0, logprobs=4),
    "all": SamplingParams(
        temperature=0.9,
        seed=4,
        top_k=50,
        top_p=0.95,
        min_p=0.01,
        repetition_penalty=1.2,
        presence_penalty=0.3,
        frequency_penalty=0.2,
        logit_bias=((12, 3.0), (5, 2.0)),
        bad_words=((12, 12), (13,)),
        min_tokens=4,
        logprobs=20,
    ),
    "typical alone": SamplingParams(temperature=1.2, seed=8, typical_p=0.4),
    "typical": SamplingParams(temperature=1.0, seed=5, typical_p=0.6, frequency_penalty=0.5),
}
"""What the device samples by itself."""

ON_HOST = {
    "long bad word": SamplingParams(temperature=0.0, bad_words=((7, 7, 7, 7, 7, 7),)),
    "many logprobs": SamplingParams(temperature=0.0, logprobs=21),
}
"""What it does not."""

PLAIN = (SamplingParams(temperature=0.0), SamplingParams(temperature=0.9, seed=6, top_p=0.9))


def requests_of(samplings: Sequence[SamplingParams], *, output: int = 10) -> list[GenerateRequest]:
    """Return a request for each, of prompts of all lengths whose bad words are about to come."""
    return [
        request(i, [2 + (i + j) % 9 for j in range(1 + 5 * i % 13)], output, sampling, STOP)
        for i, sampling in enumerate(samplings)
    ]


def with_words_that_come(
    requests: Sequence[GenerateRequest], outputs: Sequence[Sequence[int]]
) -> list[GenerateRequest]:
    """Forbid what was said without that: a word of two, of three, and of five tokens each."""
    changed = []
    for r, output in zip(requests, outputs, strict=True):
        said = (*r.prompt, *output)
        words = tuple(said[-n - 1 : -1] for n in (2, 3, 5) if len(output) > 2 and len(said) > n)
        sampling = replace(r.sampling, bad_words=(*r.sampling.bad_words, *words))
        changed.append(replace(r, sampling=sampling))
    return changed


def assert_same_logprobs(found: EngineWorld, known: EngineWorld) -> None:
    """Assert that two worlds told the same logprobs, but for the last bits of them."""
    pairs = zip(found.logprobs.values(), known.logprobs.values(), strict=True)
    for its, expected in pairs:
        for one, other in zip(its, expected, strict=True):
            assert (one is None) == (other is None)
            if one is not None and other is not None:
                _assert_close(one, other)


def _assert_close(one: TokenLogprobs, other: TokenLogprobs) -> None:
    assert abs(one.logprob - other.logprob) < 1e-4
    assert [token for token, _ in one.top] == [token for token, _ in other.top]
    for (_, its), (_, expected) in zip(one.top, other.top, strict=True):
        assert abs(its - expected) < 1e-4
