"""Stages are balanced, and nothing is better than what is chosen."""

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.parallel.stages import balanced_stages


def weights(costs: list[int], borders: tuple[int, ...], first: int, last: int) -> list[int]:
    found = [sum(costs[a:b]) for a, b in pairwise((0, *borders, len(costs)))]
    found[0] += first
    found[-1] += last
    return found


@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=8),
    st.integers(1, 8),
    st.integers(0, 60),
    st.integers(0, 60),
)
def test_no_other_borders_are_better(costs: list[int], stages: int, first: int, last: int) -> None:
    stages = min(stages, len(costs))
    chosen = balanced_stages(costs, stages, first=first, last=last)
    assert all(a < b for a, b in pairwise((0, *chosen, len(costs))))
    found = weights(costs, chosen, first, last)
    for other in combinations(range(1, len(costs)), stages - 1):
        assert max(found) <= max(weights(costs, other, first, last))


def test_equal_layers_make_equal_stages() -> None:
    assert balanced_stages([5] * 8, 4) == (2, 4, 6)
    assert balanced_stages([5] * 7, 3) in {(2, 4), (2, 5), (3, 5)}
    assert balanced_stages([5] * 3, 1) == ()


def test_the_ends_take_fewer_layers_where_they_have_more_to_do() -> None:
    assert balanced_stages([10] * 6, 3, first=20, last=10) == (1, 4)


def test_more_stages_than_layers_are_a_bug() -> None:
    with pytest.raises(AssertionError, match="4 stages of 3 layers"):
        balanced_stages([1] * 3, 4)
