from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import ReduceOps

from baton.core.request import SamplingParams
from baton.executor import noise as reference
from baton.executor.sampler import sample as reference_sample
from baton.executor.truncation import truncated
from baton.kernels.triton import sampling
from baton.kernels.triton.cuts import bits_to_float, least_kept, ordered_bits
from baton.kernels.triton.noise import exponential, mix, row_key
from baton.kernels.triton.sampling import (
    LogitChanges,
    Penalties,
    SamplingTensors,
    change_logits_,
    sample,
)

VOCABULARY = 1300


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(sampling, "_PART", 512)
    monkeypatch.setattr(sampling, "_CUT_BLOCK", 512)


@triton.jit
def _noise(seeds, positions, tokens, integers, out, N: tl.constexpr):
    i = tl.arange(0, N)
    key = row_key(tl.load(seeds), tl.load(positions))
    token = tl.load(tokens + i)
    tl.store(integers + i, mix(key + token.to(tl.uint64)).to(tl.int64))
    tl.store(out + i, exponential(key, token))


def test_noise_is_that_of_the_host():
    random = torch.Generator().manual_seed(0)
    for seed in (0, 1, -1, 2**63 - 1, -(2**63), 123456789):
        position = torch.randint(0, 2**40, (1,), generator=random)
        tokens = torch.randint(0, 2**20, (1024,), generator=random)
        seeds = torch.tensor([seed])
        integers, found = torch.empty_like(tokens), torch.empty(1024)
        _noise[(1,)](seeds, position, tokens, integers, found, N=1024)
        key = reference.mix(reference.mix(seeds) + position)
        assert integers.equal(reference.mix(key + tokens))
        expected = reference.exponential(seeds, position, tokens[None])[0]
        gap = (found - expected).abs() / expected
        assert gap.max() <= 4 * 2.0**-24, "more than the last bit of a logarithm"


@triton.jit
def _least(scores, bounds, out, N: tl.constexpr):
    floor = ordered_bits(tl.full([], -float("inf"), tl.float32))
    bound = tl.load(bounds)
    tl.store(out, bits_to_float(least_kept(scores, N, 0.0, floor, bound, False, 64)))


@pytest.mark.parametrize("k", [1, 2, 17, 99, 100])
def test_the_kth_largest_is_found_among_all_sorts_of_floats(k):
    random = torch.Generator().manual_seed(k)
    scores = torch.randn(100, generator=random) * 10 ** torch.randint(-38, 38, (100,)).float()
    scores[:5] = torch.tensor([0.0, -0.0, 1e-45, float("-inf"), 1.0])
    out = torch.empty(1)
    _least[(1,)](scores, torch.tensor([float(k)]), out, N=100)
    assert out.item() == scores.sort(descending=True).values[k - 1].item()


def tensors(params: list[SamplingParams], positions: list[int]) -> SamplingTensors:
    def of(name: str, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor([getattr(p, name) for p in params], dtype=dtype)

    return SamplingTensors(
        of("temperature", torch.float32),
        of("top_k", torch.int32),
        of("top_p", torch.float32),
        of("min_p", torch.float32),
        of("seed", torch.int64),
        torch.tensor(positions),
    )


PARAMS = [
    SamplingParams(temperature=0.0, seed=1),
    SamplingParams(temperature=1.0, seed=2),
    SamplingParams(temperature=0.7, top_k=5, seed=3),
    SamplingParams(temperature=1.5, top_p=0.4, seed=4),
    SamplingParams(temperature=2.0, top_k=40, top_p=0.8, seed=5),
    SamplingParams(temperature=1.3, min_p=0.1, seed=6),
    SamplingParams(temperature=1.1, top_k=400, top_p=0.9, min_p=0.02, seed=7),
    SamplingParams(temperature=1.0, top_k=1, seed=-8),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_are_those_of_the_host(dtype):
    random = torch.Generator().manual_seed(3)
    for trial in range(2):
        logits = (4 * torch.randn((len(PARAMS), VOCABULARY), generator=random)).to(dtype)
        if trial:
            logits[:, ::7] = logits.amax() - 1  # ties
        positions = torch.randint(1, 1000, (len(PARAMS),), generator=random).tolist()
        found = sample(logits, tensors(PARAMS, positions))
        assert found.tolist() == reference_sample(logits.float(), PARAMS, positions)


def test_what_is_cut_is_never_drawn_and_all_else_is(monkeypatch):
    """Over many positions, the tokens drawn are exactly those that the host's cuts leave."""
    monkeypatch.setattr(sampling, "_CUT_BLOCK", 64)
    params = SamplingParams(temperature=3.0, top_k=6, top_p=0.9, seed=11)
    random = torch.Generator().manual_seed(5)
    logits = torch.randn((1, 64), generator=random).expand(32, 64).contiguous()
    found = sample(logits, tensors([params] * 32, list(range(32))))
    left = truncated(logits[:1], [params])[0].isfinite().nonzero().flatten()
    assert set(found.tolist()) == set(left.tolist())


def logit_changes(
    changes: list[tuple[int, int, float, int]], after: torch.Tensor | None = None
) -> LogitChanges:
    rows, tokens, amounts, until = zip(*changes, strict=True)
    return LogitChanges(
        torch.tensor(rows, dtype=torch.int32),
        torch.tensor(tokens, dtype=torch.int32),
        torch.tensor(amounts),
        torch.tensor(until),
        after,
    )


def test_changes_count_until_a_position_and_after_what_was_said():
    out, no = float("-inf"), 1 << 40
    positions = torch.tensor([5, 6])
    changes = [(0, 3, out, 6), (1, 3, out, 6), (0, 8, 2.0, no), (0, 8, out, no), (1, 9, out, no)]
    any_, word, other = [-1, -1], [-1, 4], [7, 4]
    after = torch.tensor([any_, any_, any_, word, other], dtype=torch.int32)
    for recent, forbidden in ([7, 4], True), ([4, 7], False):
        logits = torch.zeros(2, 12)
        said = torch.tensor([recent, recent], dtype=torch.int32)
        change_logits_(logits, logit_changes(changes, after), positions, said)
        expected = torch.zeros(2, 12)
        expected[0, 3] = out
        expected[0, 8] = out if forbidden else 2.0
        expected[1, 9] = out if forbidden else 0.0
        assert logits.equal(expected)


def test_penalties_and_changes():
    random = torch.Generator().manual_seed(4)
    rows = 4
    logits = 3 * torch.randn((rows, VOCABULARY), generator=random)
    seen = torch.randint(0, 4, (3, VOCABULARY), generator=random, dtype=torch.int32)
    sequences = torch.tensor([2, -1, 0, 1], dtype=torch.int32)
    repetition, frequency, presence = (torch.rand(rows, generator=random) + 0.6 for _ in range(3))
    expected = logits.clone()
    changes = [(0, 3, 5.0), (2, 9, float("-inf")), (-1, 0, 1e9), (3, 1299, -2.0)]
    for row, token, change in changes:
        if row >= 0:
            expected[row, token] += change
    for row, sequence in enumerate(sequences.tolist()):
        if sequence >= 0:
            count = seen[sequence]
            x = expected[row]
            x = torch.where(x > 0, x / repetition[row], x * repetition[row])
            x -= frequency[row] * (count - 1) + presence[row] * (count > 1)
            expected[row] = torch.where(count > 0, x, expected[row])
    params = [replace(PARAMS[i], temperature=t) for i, t in enumerate((0.0, 1.0, 0.9, 0.0))]
    before = seen.clone()
    change_logits_(logits, logit_changes([(*c, 100) for c in changes]), torch.tensor([7] * rows))
    penalties = Penalties(seen, sequences, repetition, frequency, presence)
    found = sample(logits, tensors(params, [7] * rows), penalties)
    assert found.tolist() == reference_sample(expected, params, [7] * rows)
    for row, sequence in enumerate(sequences.tolist()):
        if sequence >= 0:
            before[sequence, found[row]] = before[sequence, found[row]].clamp(min=1) + 1
    assert seen.equal(before), "each new token is counted, and nothing else"


def test_the_winner_of_what_is_no_number_is_within_its_row(monkeypatch):
    """By the comparison that a GPU makes: no number is less than NaN, so padding wins over it."""
    monkeypatch.setattr(ReduceOps, "apply_impl", ReduceOps.generic_reduce)
    greedy = [SamplingParams(temperature=0.0)] * 2
    vocabulary = 3 * 512  # parts that are full, and one of four that is not there
    logits = torch.randn((2, vocabulary), generator=torch.Generator().manual_seed(5))
    best = int(logits[1].argmax())
    logits[0] = float("nan")
    assert sample(logits, tensors(greedy, [7, 7])).tolist() == [vocabulary - 1, best]


def test_logits_that_are_not_finite_count_in_their_own_history_alone():
    logits = torch.full((1, VOCABULARY), float("nan"))
    seen = torch.zeros(3, VOCABULARY, dtype=torch.int32)
    one = torch.ones(1)
    penalties = Penalties(seen, torch.tensor([1], dtype=torch.int32), one, one, one)
    sample(logits, tensors([SamplingParams(temperature=0.0)], [7]), penalties)
    assert not seen[0].any()
    assert not seen[2].any()
