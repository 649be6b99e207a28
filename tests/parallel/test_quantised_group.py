"""The int8 all-reduce: its error bound, its bits, its bytes."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from baton.parallel.counted_group import CountedGroup, Traffic
from baton.parallel.group import Group, Ranks
from baton.parallel.mesh import Mesh, Place
from baton.parallel.quantised_group import BLOCK, QuantisedGroup, packed, unpack

from .ranks import RankProcesses

LENGTHS = (1, BLOCK, 3 * BLOCK + 5, 300_001)  # the last in several passes
MAGNITUDES = (1e-30, 1.0, 1e30)


def terms_of(rank: int, length: int, magnitude: float) -> Tensor:
    """What a rank adds: numbers of many magnitudes, and a block of zeros."""
    random = torch.Generator().manual_seed(rank)
    wide = torch.randn(length, generator=random) * 4 ** torch.randn(length, generator=random)
    wide[BLOCK : 2 * BLOCK] = 0
    return wide * magnitude


def counted(group: Group) -> tuple[QuantisedGroup, Traffic]:
    assert isinstance(group, CountedGroup)
    traffic = Traffic()
    return QuantisedGroup(CountedGroup(group.below, traffic), from_bytes=0), traffic


def sums(ranks: Ranks, place: Place) -> list[np.ndarray]:
    group, _ = counted(ranks.tp)
    return [
        group.all_reduce_(terms_of(group.rank, length, magnitude)).numpy()
        for length in LENGTHS
        for magnitude in MAGNITUDES
    ]


def largest_by_block(x: Tensor) -> Tensor:
    """Return each number's block's largest magnitude."""
    padded = torch.zeros(-(-x.numel() // BLOCK) * BLOCK)
    padded[: x.numel()] = x.abs()
    return padded.view(-1, BLOCK).amax(1).repeat_interleave(BLOCK)[: x.numel()]


@pytest.mark.parametrize("size", [2, 3])
def test_the_error_is_within_the_bound_and_the_bits_are_the_same(
    processes: RankProcesses, size: int
) -> None:
    found = processes.run(Mesh(tp=size), sums)
    cases = [(length, magnitude) for length in LENGTHS for magnitude in MAGNITUDES]
    for i, (length, magnitude) in enumerate(cases):
        assert len({by_rank[i].tobytes() for by_rank in found}) == 1
        terms = [terms_of(rank, length, magnitude) for rank in range(size)]
        total = torch.stack(terms).double().sum(0)
        steps = sum(largest_by_block(x).double() for x in terms)
        # The block's sum is itself off by the first rounding, and all of it is float32.
        bound = (steps + largest_by_block(total.float()) + steps / 254) / 254 * (1 + 1e-5)
        error = (torch.from_numpy(found[0][i]).double() - total).abs()
        assert (error <= bound).all()
        assert length == 1 or error.max() > 0, "it was not quantised"


def bytes_moved(ranks: Ranks, place: Place) -> dict[str, int]:
    group, traffic = counted(ranks.tp)
    group.all_reduce_(torch.ones(64 * BLOCK))
    group.all_reduce_(torch.ones(64, dtype=torch.int64))
    return {kind: moved.bytes for kind, moved in traffic.stats().items()}


def test_it_moves_132_bytes_for_512(processes: RankProcesses) -> None:
    """A number that is not a float goes as it is."""
    expected = {"all_to_all": 32 * (BLOCK + 4), "all_gather": 32 * (BLOCK + 4), "all_reduce": 512}
    assert processes.run(Mesh(tp=2), bytes_moved) == [expected] * 2


def not_finite(ranks: Ranks, place: Place) -> list[bool]:
    group, _ = counted(ranks.tp)
    x = torch.ones(4 * BLOCK, dtype=torch.bfloat16)
    if group.rank == 0:
        x[0], x[BLOCK] = float("nan"), float("inf")
    return [bool(block.isfinite().all()) for block in group.all_reduce_(x).view(4, BLOCK)]


def test_what_is_not_finite_shows_on_all_ranks(processes: RankProcesses) -> None:
    assert processes.run(Mesh(tp=2), not_finite) == [[False, False, True, True]] * 2


@given(st.lists(st.floats(-(2.0**126), 2.0**126, width=32), min_size=1))
def test_one_rounding_is_off_by_half_a_step(values: list[float]) -> None:
    x = torch.tensor(values)
    found = torch.empty_like(x)
    unpack(packed(x), found)
    step = (largest_by_block(x).double() / 127).clamp_min(torch.finfo(torch.float32).tiny)
    assert ((found.double() - x.double()).abs() <= step / 2 * (1 + 1e-5)).all()
