"""Ranks that have the logits of some tokens each choose what one rank with all logits chooses."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from baton.core.ids import SeqId
from baton.core.request import SamplingParams, TokenLogprobs
from baton.engine.step import SamplingContext
from baton.executor.batch import SampledRow
from baton.executor.candidates import Candidates
from baton.executor.grammar_mask import GrammarMask
from baton.executor.sampler import Sampler, draw
from baton.executor.sharded_sampler import CANDIDATES, ShardedSampler
from baton.parallel.group import Group, Ranks, SoloGroup
from baton.parallel.mesh import Mesh, Place
from baton.parallel.split import uneven

VOCABULARY = 1001
ROWS = 24
SEEDS = range(8)
STOP = (3, 700)

Found = tuple[list[int], dict[SeqId, TokenLogprobs]]


def logits_of(seed: int) -> Tensor:
    """Some steep, some flat, some rounded as bfloat16 rounds, so that many tokens tie."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(ROWS, VOCABULARY, generator=generator) * (0.3, 3.0, 6.0)[seed % 3]
    return found.bfloat16().float() if seed % 4 == 0 else found


def params_of(chosen: random.Random) -> SamplingParams:
    """Every kind of row, and all kinds in a batch."""
    return SamplingParams(
        temperature=chosen.choice([0.0, 0.7, 1.3]),
        top_k=chosen.choice([0, 0, 1, 50, CANDIDATES, CANDIDATES + 1, VOCABULARY]),
        top_p=chosen.choice([1.0, 1.0, 0.5, 0.9, 0.999]),
        min_p=chosen.choice([0.0, 0.0, 0.05, 0.3]),
        typical_p=chosen.choice([1.0, 1.0, 1.0, 0.8]),
        seed=chosen.randrange(2**60),
        repetition_penalty=chosen.choice([1.0, 1.3]),
        frequency_penalty=chosen.choice([0.0, 0.7]),
        presence_penalty=chosen.choice([0.0, -1.0]),
        logit_bias=chosen.choice([(), ((5, 30.0),), ((800, -100.0), (0, 3.5))]),
        bad_words=chosen.choice([(), ((7,), (1, 2)), ((900,),)]),
        min_tokens=chosen.choice([0, 1000]),
        logprobs=chosen.choice([None, None, 0, 5]),
    )


def rows_of(seed: int) -> list[SampledRow]:
    chosen = random.Random(seed)
    rows = []
    for i in range(ROWS):
        params = params_of(chosen)
        tokens = [chosen.randrange(VOCABULARY) for _ in range(chosen.randrange(1, 200))]
        before = tuple(tokens[:-1]) if params.looks_back else None
        context = None if params.plain else SamplingContext(len(tokens) // 2, STOP, before)
        rows.append(SampledRow(SeqId(i), len(tokens), params, tuple(tokens[-1:]), context))
    return rows


def masks_of(seed: int) -> dict[SeqId, GrammarMask]:
    """Of every third row with a context: from one token of the vocabulary to most of them."""
    chosen = np.random.default_rng(seed)
    masks = {}
    for row in rows_of(seed):
        if row.context is not None and row.seq_id % 3 == 0:
            share = chosen.choice([0.002, 0.1, 0.9])
            allowed = chosen.random(VOCABULARY) < share
            allowed[chosen.integers(4, VOCABULARY)] = True
            padded = np.packbits(np.append(allowed, np.zeros(23, bool)), bitorder="little")
            bits = padded.view(np.int32)
            masks[row.seq_id] = GrammarMask(bits, bool(chosen.integers(2)), STOP[:1], VOCABULARY)
    return masks


def step(group: Group, seed: int) -> Found:
    own = uneven(VOCABULARY, group.rank, group.size)
    sampler = ShardedSampler(group, VOCABULARY)
    return sampler.step(logits_of(seed)[:, own].clone(), rows_of(seed), masks_of(seed))


def steps(ranks: Ranks, place: Place) -> list[Found]:
    return [step(ranks.tp, seed) for seed in SEEDS]


def assert_same(found: Found, seed: int) -> None:
    rows = rows_of(seed)
    masks = masks_of(seed)
    assert masks
    tokens, logprobs = Sampler().step(logits_of(seed), rows, masks)
    unmasked, _ = Sampler().step(logits_of(seed), rows)
    assert unmasked != tokens, "masks have no effect: a blind test"
    assert [(r.sampling, t) for r, t in zip(rows, found[0], strict=True)] == [
        (r.sampling, t) for r, t in zip(rows, tokens, strict=True)
    ]
    assert found[1] == logprobs


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_choose_what_one_rank_chooses(processes: Any, size: int) -> None:
    for outcome in processes.run(Mesh(tp=size), steps):
        for seed, found in zip(SEEDS, outcome, strict=True):
            assert_same(found, seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_group_of_one_does_too(seed: int) -> None:
    assert_same(step(SoloGroup(), seed), seed)


def test_no_rows_and_no_exchange() -> None:
    assert ShardedSampler(SoloGroup(), 10).step(torch.empty(0, 10), []) == ([], {})


class Counting(SoloGroup):
    """Keeps the size of what is gathered."""

    def __init__(self) -> None:
        self.gathered: list[tuple[int, ...]] = []

    def all_gather(self, x: Tensor, rows: Any = None) -> Tensor:
        self.gathered.append(tuple(x.shape))
        return x


@pytest.mark.parametrize(
    ("params", "sent"),
    [
        (SamplingParams(temperature=0), 2),
        (SamplingParams(), 2),
        (SamplingParams(top_k=50), 2 * CANDIDATES + 2),
        (SamplingParams(top_k=50, top_p=0.9, min_p=0.1), 2 * CANDIDATES + 2),
    ],
)
def test_one_small_exchange_decides_most_rows(params: SamplingParams, sent: int) -> None:
    group = Counting()
    steep = torch.randn(4, 5000, generator=torch.Generator().manual_seed(1)) * 5
    ShardedSampler(group, 5000).sample(steep, [params] * 4, [3] * 4)
    assert group.gathered == [(1, 4 * sent)]


@pytest.mark.parametrize(
    "params", [SamplingParams(typical_p=0.9), SamplingParams(top_k=CANDIDATES + 1)]
)
def test_only_rows_that_need_it_are_gathered_whole(params: SamplingParams) -> None:
    group = Counting()
    flat = torch.zeros(3, 500)
    chosen = [params, SamplingParams(temperature=0), SamplingParams(top_p=0.9)]
    ShardedSampler(group, 500).sample(flat, chosen, [1, 2, 3])
    # A nucleus of 450 equal tokens is not among 128 candidates either.
    assert group.gathered[1:] == [(500, 2)]


def test_candidates_know_when_they_are_not_enough() -> None:
    """Two shards of three tokens each, of which two were sent; ties with what was kept back."""
    scores = torch.tensor([[5.0, 4.0, 4.0, 3.0]])
    tokens = torch.tensor([[4, 0, 1, 5]])
    whole = torch.tensor([[4.0, 4.0, 2.0, 1.0, 5.0, 3.0]])
    mass = whole.logsumexp(-1, keepdim=True)
    candidates = Candidates(scores, tokens, torch.tensor([[4.0]]), mass)
    for params, right in [
        (SamplingParams(top_k=1), True),
        (SamplingParams(top_k=2), False),  # the fourth 4.0 may be one that was not sent
        (SamplingParams(top_p=0.3), True),
        (SamplingParams(top_p=0.9), False),
        (SamplingParams(min_p=0.9), True),
        (SamplingParams(min_p=0.1), False),
        (SamplingParams(top_k=1, top_p=0.99), True),
    ]:
        found, complete = candidates.draw([params], [9])
        assert complete.tolist() == [right], params
        if right:
            assert found.tolist() == draw(whole, [params], [9]).tolist()
