"""What tensors of parameters sample is what the host's sampler does."""

from dataclasses import replace

import pytest
import torch

from baton.core.request import SamplingParams
from baton.executor.device_sampler import RowSampling, begin_history_, sample_rows
from baton.executor.sampler import sample

CASES = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=1.0, seed=1),
    SamplingParams(temperature=0.7, seed=2, top_k=1),
    SamplingParams(temperature=1.3, seed=3, top_k=12),
    SamplingParams(temperature=0.9, seed=4, top_p=0.5),
    SamplingParams(temperature=1.1, seed=5, top_k=40, top_p=0.8),
    SamplingParams(temperature=1.5, seed=6, min_p=0.2),
    SamplingParams(temperature=2.0, seed=2**63 - 1, top_k=500, top_p=1e-6, min_p=0.01),
]
TYPICAL = [
    SamplingParams(temperature=1.0, seed=7, typical_p=0.3),
    SamplingParams(temperature=1.4, seed=8, typical_p=0.95, top_k=60, min_p=0.001),
    SamplingParams(temperature=0.8, seed=9, typical_p=1e-6),
    SamplingParams(temperature=0.0, typical_p=0.5),
]


def rows_of(params: list[SamplingParams], positions: list[int]) -> RowSampling:
    return RowSampling(
        temperature=torch.tensor([p.temperature for p in params]),
        top_k=torch.tensor([p.top_k for p in params], dtype=torch.int32),
        top_p=torch.tensor([p.top_p for p in params]),
        min_p=torch.tensor([p.min_p for p in params]),
        seeds=torch.tensor([p.seed for p in params]),
        positions=torch.tensor(positions),
        typical_p=torch.tensor([p.typical_p for p in params]),
    )


@pytest.mark.parametrize("vocabulary", [300, 4096])
def test_tokens_are_those_of_the_host(vocabulary: int) -> None:
    random = torch.Generator().manual_seed(vocabulary)
    for turn in range(6):
        logits = 3 * torch.randn(len(CASES), vocabulary, generator=random)
        positions = [turn * 100 + i for i in range(len(CASES))]
        expected = sample(logits.clone(), CASES, positions)
        rows = rows_of(CASES, positions)
        assert sample_rows(logits, rows).tolist() == expected
        assert sample_rows(logits, replace(rows, typical_p=None)).tolist() == expected


def test_typical_rows_are_those_of_the_host_among_others_and_more_than_are_sorted_at_once() -> None:
    mixed = [*TYPICAL, *CASES] * 3
    logits = 3 * torch.randn(len(mixed), 500, generator=torch.Generator().manual_seed(2))
    positions = list(range(len(mixed)))
    expected = sample(logits.clone(), mixed, positions)
    assert sample_rows(logits, rows_of(mixed, positions)).tolist() == expected


def test_a_history_begins_with_what_was_said() -> None:
    seen = torch.full((8,), 9, dtype=torch.int32)
    begin_history_(seen, torch.tensor([1, 1, 2]), torch.tensor([2, 5, 5, 5]))
    assert seen.tolist() == [0, 1, 2, 0, 0, 4, 0, 0]
    nothing = torch.empty(0, dtype=torch.int64)
    begin_history_(seen, nothing, nothing)
    assert not seen.any()
