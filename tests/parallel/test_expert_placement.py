"""Experts are all somewhere, and hot ones at several places."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.core.errors import InvalidConfig
from baton.parallel.expert_placement import (
    Placement,
    balanced_placement,
    better_placement,
    even_placement,
)


def test_evenly_neighbours_are_together() -> None:
    placement = even_placement(6, 3)
    assert placement.held == ((0, 1), (2, 3), (4, 5))
    assert placement.experts == 6
    assert placement.places(3) == (1,)


@given(st.data())
def test_every_expert_is_somewhere_and_no_place_has_too_many(data: st.DataObject) -> None:
    places = data.draw(st.integers(1, 6))
    loads = data.draw(st.lists(st.integers(0, 1000), min_size=places, max_size=24))
    each = data.draw(st.integers(-(-len(loads) // places), len(loads)))
    placement = balanced_placement(loads, places, each)
    assert placement.experts == len(loads)
    assert all(placement.places(expert) for expert in range(len(loads)))
    assert all(len(held) <= each for held in placement.held)
    # Graham's bound for the longest first, where only room and copies can stand in the way.
    heaviest = max(load / len(placement.places(e)) for e, load in enumerate(loads))
    if each == len(loads):
        assert max(placement.work(loads)) <= sum(loads) / places + heaviest


def test_a_hot_expert_is_at_several_places() -> None:
    loads = [700, 100, 100, 100]
    without = balanced_placement(loads, 2, 2)
    assert sorted(without.work(loads)) == [200, 800]
    redundant = balanced_placement(loads, 2, 3)
    assert redundant.places(0) == (0, 1)
    assert max(redundant.work(loads)) <= 550


def test_it_is_better_than_an_even_one_where_loads_are_uneven() -> None:
    loads = [90, 80, 10, 5, 5, 10, 20, 30]
    assert max(even_placement(8, 4).work(loads)) == 170
    assert max(balanced_placement(loads, 4, 2).work(loads)) == 95


def test_experts_move_only_where_that_is_worth_it() -> None:
    even = even_placement(4, 2)
    assert better_placement(even, [100, 100, 95, 95], 2) is None
    assert better_placement(even, [0, 0, 0, 0], 2) is None
    uneven = [90, 80, 10, 20]
    better = better_placement(even, uneven, 2)
    assert better is not None
    assert better.work(uneven) == (100, 100)
    assert better_placement(better, uneven, 2) is None


def test_refuses_too_little_room_and_too_much() -> None:
    with pytest.raises(InvalidConfig, match=r"experts at a place.*2 to 4 for 4 experts"):
        balanced_placement([1] * 4, 2, 1)
    with pytest.raises(InvalidConfig, match=r"experts at a place.*2 to 4 for 4 experts"):
        balanced_placement([1] * 4, 2, 5)


def test_refuses_experts_that_are_nowhere_or_twice() -> None:
    with pytest.raises(InvalidConfig, match=r"every expert"):
        Placement(((0, 2), (3,)))
    with pytest.raises(InvalidConfig, match=r"at a place once"):
        Placement(((0, 1, 1), (2,)))
