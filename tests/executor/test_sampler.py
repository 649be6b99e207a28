"""The sampler cuts as transformers' warpers do and draws each token as often as it should."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from baton.core.request import SamplingParams
from baton.executor.noise import exponential, mix
from baton.executor.sampler import sample
from baton.executor.truncation import truncated

VOCABULARY = 257
GOLDEN = 0x9E3779B97F4A7C15


def split_mix(state: int) -> int:
    """Return SplitMix64's output, in Python's integers."""
    state = (state + GOLDEN) % 2**64
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    state = (state ^ state >> 27) * 0x94D049BB133111EB % 2**64
    return state ^ state >> 31


def logits(rows: int, seed: int = 0, vocabulary: int = VOCABULARY) -> Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3


def warped(row: Tensor, params: SamplingParams) -> Tensor:
    """Return one row [1, vocabulary] as transformers' generate would draw from it."""
    ids = torch.zeros(1, 1, dtype=torch.int64)
    if params.temperature != 1.0:
        row = TemperatureLogitsWarper(params.temperature)(ids, row)
    if params.top_k:
        row = TopKLogitsWarper(params.top_k)(ids, row)
    if params.top_p < 1.0:
        row = TopPLogitsWarper(params.top_p)(ids, row)
    if params.min_p > 0:
        row = MinPLogitsWarper(params.min_p)(ids, row)
    if params.typical_p < 1.0:
        row = TypicalLogitsWarper(params.typical_p)(ids, row)
    return row


def assert_cut_as_transformers(scores: Tensor, params: Sequence[SamplingParams]) -> None:
    found = truncated(scores, params)
    expected = torch.cat([warped(scores[i : i + 1], p) for i, p in enumerate(params)])
    assert torch.equal(found, expected)
    assert torch.equal(found.softmax(-1), expected.softmax(-1))


CASES = [
    SamplingParams(),
    SamplingParams(temperature=0.7),
    SamplingParams(temperature=2.0, top_k=1),
    SamplingParams(top_k=40),
    SamplingParams(top_k=VOCABULARY),
    SamplingParams(top_k=10**6),
    SamplingParams(top_p=0.9),
    SamplingParams(top_p=1e-9),
    SamplingParams(top_p=0.9999999),
    SamplingParams(temperature=0.3, top_k=5, top_p=0.8),
    SamplingParams(temperature=1.7, top_k=100, top_p=0.5),
    SamplingParams(temperature=1e-4, top_k=3, top_p=0.2),
    SamplingParams(min_p=0.1),
    SamplingParams(min_p=1.0),
    SamplingParams(temperature=2.0, min_p=1e-4),
    SamplingParams(typical_p=0.9),
    SamplingParams(typical_p=0.2),
    SamplingParams(typical_p=1e-6),
    SamplingParams(temperature=1.5, typical_p=0.9999),
    SamplingParams(temperature=1.8, top_k=90, top_p=0.97, min_p=0.005, typical_p=0.8),
    SamplingParams(temperature=0.9, top_p=0.9, min_p=0.02),
    SamplingParams(top_k=30, typical_p=0.5),
]


@pytest.mark.parametrize("params", CASES)
def test_cuts_as_transformers(params: SamplingParams) -> None:
    assert_cut_as_transformers(logits(8), [params] * 8)


def test_cuts_every_row_by_its_own_parameters() -> None:
    assert_cut_as_transformers(logits(len(CASES), seed=1), CASES)


def test_cuts_what_is_left_when_tokens_are_forbidden() -> None:
    scores = logits(len(CASES), seed=2)
    scores[:, ::3] = float("-inf")
    scores[3, 4:] = float("-inf")
    assert_cut_as_transformers(scores, CASES)


def test_ties_with_the_last_token_of_top_k_are_kept() -> None:
    row = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]])
    kept = truncated(row, [SamplingParams(top_k=2)]).isfinite()
    assert kept.tolist() == [[False, True, True, True, True, False]]
    assert_cut_as_transformers(row, [SamplingParams(top_k=2)])


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31),
    st.floats(0.01, 2.0),
    st.integers(0, 2 * VOCABULARY),
    st.floats(1e-6, 1.0),
    st.just(0.0) | st.floats(0.0, 1.0),
    st.just(1.0) | st.floats(1e-6, 1.0),
)
def test_cuts_as_transformers_anywhere(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float, typical_p: float
) -> None:
    params = SamplingParams(temperature, top_k, top_p, min_p=min_p, typical_p=typical_p)
    assert_cut_as_transformers(logits(2, seed), [params, SamplingParams(temperature)])


@pytest.mark.parametrize("temperature", [0.0, 1e-300, 1e-7])
def test_no_temperature_is_greedy(temperature: float) -> None:
    scores = logits(5)
    params = [SamplingParams(temperature=temperature, seed=i) for i in range(5)]
    assert sample(scores, params, [0] * 5) == scores.argmax(-1).tolist()


def test_a_tiny_temperature_and_a_tiny_top_p_leave_the_likeliest() -> None:
    scores = logits(64)
    best = scores.argmax(-1).tolist()
    for params in (
        SamplingParams(temperature=1e-5),
        SamplingParams(top_p=1e-12),
        SamplingParams(top_k=1),
    ):
        assert sample(scores * 50, [params] * 64, list(range(64))) == best


def drawn(row: Tensor, params: SamplingParams, count: int, first: int = 0) -> np.ndarray:  # type: ignore[type-arg]
    """Return how often each token is drawn at `count` positions."""
    tokens: list[int] = []
    for start in range(first, first + count, 1000):
        positions = list(range(start, start + 1000))
        tokens += sample(row.expand(1000, -1), [params] * 1000, positions)
    return np.bincount(tokens, minlength=row.shape[1])


def assert_as_often(counts: np.ndarray, probabilities: Tensor) -> None:  # type: ignore[type-arg]
    """Assert that chi-square is below its mean + 5 standard deviations (p > 1 - 1e-5)."""
    expected = probabilities.double().numpy() * counts.sum()
    assert counts[expected == 0].sum() == 0
    rare = expected < 10
    cells = np.append(expected[~rare], expected[rare].sum())
    found = np.append(counts[~rare], counts[rare].sum())
    found, cells = found[cells > 0], cells[cells > 0]
    chi_square = ((found - cells) ** 2 / cells).sum()
    freedom = len(cells) - 1
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(seed=0),
        SamplingParams(seed=2**63 - 1),
        SamplingParams(temperature=1.5, top_k=20, seed=3),
        SamplingParams(temperature=1.2, top_p=0.9, seed=4),
        SamplingParams(temperature=1.4, min_p=0.02, seed=5),
        SamplingParams(temperature=1.4, typical_p=0.7, seed=6),
        SamplingParams(temperature=1.3, top_k=30, top_p=0.95, min_p=0.01, typical_p=0.8, seed=7),
    ],
)
def test_tokens_are_drawn_as_often_as_they_are_likely(params: SamplingParams) -> None:
    row = logits(1, seed=5, vocabulary=60)
    counts = drawn(row, params, 40_000, first=17)
    assert_as_often(counts, warped(row, params).softmax(-1)[0])


def test_seeds_are_as_good_a_source_of_noise_as_positions() -> None:
    row = logits(1, seed=6, vocabulary=30)
    params = [SamplingParams(seed=seed) for seed in range(20_000)]
    tokens = sample(row.expand(20_000, -1), params, [9] * 20_000)
    assert_as_often(np.bincount(tokens, minlength=30), row.softmax(-1)[0])


def test_neighbouring_positions_and_seeds_are_independent() -> None:
    """Pairs of draws fill the product of their distributions."""
    row = torch.zeros(1, 4)
    for step in ((0, 1), (1, 0), (1, 1), (1, -1)):
        params = [SamplingParams(seed=1000 + i * step[0]) for i in range(20_000)]
        positions = [30_000 + i * step[1] for i in range(20_000)]
        tokens = np.array(sample(row.expand(20_000, -1), params, positions))
        pairs = np.bincount(tokens[0::2] * 4 + tokens[1::2], minlength=16)
        assert_as_often(pairs, torch.full((16,), 1 / 16))


def test_a_row_gives_the_same_token_in_any_batch() -> None:
    scores = logits(40, seed=7)
    params = [CASES[i % len(CASES)] for i in range(40)]
    params = [
        replace(p, temperature=p.temperature * (i % 5 > 0), seed=i) for i, p in enumerate(params)
    ]
    positions = [7 * i for i in range(40)]
    together = sample(scores, params, positions)
    alone = [sample(scores[i : i + 1], [params[i]], [positions[i]])[0] for i in range(40)]
    assert together == alone
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1)).tolist()
    shuffled = sample(scores[order], [params[i] for i in order], [positions[i] for i in order])
    assert shuffled == [together[i] for i in order]


def test_the_noise_is_fixed_for_all_time() -> None:
    """A change here would change every seeded answer; outputs of SplitMix64's reference code."""
    found = [value % 2**64 for value in mix(torch.tensor([0, 1234567])).tolist()]
    assert found == [0xE220A8397B1DCDAF, 6457827717110365317]


@pytest.mark.parametrize("seed", [0, 42, 2**63 - 1])
@pytest.mark.parametrize("position", [0, 7, 131071])
def test_the_noise_is_what_plain_integers_give(seed: int, position: int) -> None:
    tokens = [0, 1, 2, 4095, 128255]
    noise = exponential(torch.tensor([seed]), torch.tensor([position]), torch.tensor([tokens]))
    key = split_mix(split_mix(seed) + position)
    for token, found in zip(tokens, noise[0].tolist(), strict=True):
        uniform = ((split_mix(key + token * GOLDEN) >> 24) + 0.5) / 2**40
        assert found == pytest.approx(-math.log1p(-uniform), rel=1e-6)


def test_the_noise_is_over_zero_finite_and_exponential() -> None:
    seeds, positions = torch.arange(200), torch.arange(200) * 31
    noise = exponential(seeds, positions, torch.arange(5000)[None])
    assert noise.shape == (200, 5000)
    assert float(noise.min()) > 0
    assert math.isfinite(float(noise.max()))
    assert float(noise.mean()) == pytest.approx(1, abs=0.01)
    assert float(noise.var()) == pytest.approx(1, abs=0.02)
    assert float((noise > 3).float().mean()) == pytest.approx(math.exp(-3), abs=0.001)
