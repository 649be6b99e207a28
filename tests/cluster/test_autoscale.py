"""The size of a pool follows from how its work goes, slowly enough not to swing."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.cluster.autoscale import (
    Giver,
    Memory,
    Signals,
    Verdict,
    decide,
    giver_for,
    pressures,
)
from baton.core.autoscale import AutoscaleConfig
from baton.core.errors import InvalidConfig

CONFIG = AutoscaleConfig(
    min=1, max=8, queue_s=1.0, ttft_s=2.0, tpot_s=0.05, grow_after_s=10.0, shrink_after_s=60.0
)
BUSY = Signals(open_requests=9, queue_s=0.9, ttft_s=1.0, tpot_s=0.04, kv_use=0.5)
SWAMPED = Signals(open_requests=99, queue_s=2.5, ttft_s=3.0, tpot_s=0.04, kv_use=0.5)
CALM = Signals(open_requests=2, queue_s=0.1, ttft_s=0.2, tpot_s=0.01, kv_use=0.1)


def after(
    seconds: float, signals: Signals, instances: int, config: AutoscaleConfig = CONFIG
) -> Verdict:
    """Return the verdict once the signals have been the same for so long."""
    first = decide(config, instances, signals, Memory(), 100.0)
    return decide(config, instances, signals, first.memory, 100.0 + seconds)


def test_every_signal_is_held_against_what_is_wanted() -> None:
    assert pressures(CONFIG, SWAMPED) == pytest.approx(
        {"kv_use": 0.5 / 0.85, "queue_s": 2.5, "ttft_s": 1.5, "tpot_s": 0.8}
    )
    assert pressures(CONFIG, Signals()) == {"kv_use": 0.0}
    assert list(pressures(AutoscaleConfig(), SWAMPED)) == ["kv_use", "queue_s"]


def test_a_pool_that_is_just_enough_stays() -> None:
    assert after(1000.0, BUSY, 3).target == 3


def test_it_grows_by_what_the_pressure_says_once_that_has_lasted() -> None:
    assert after(9.9, SWAMPED, 2).target == 2
    verdict = after(10.0, SWAMPED, 2)
    assert verdict.target == 4  # 2.5 × 2, but not more than double
    assert "queue_s is 2.50" in verdict.reason
    assert after(10.0, SWAMPED, 6).target == 8
    assert after(10.0, SWAMPED, 8).target == 8


def test_after_growing_it_waits_to_see_what_that_did() -> None:
    grown = after(10.0, SWAMPED, 2)
    assert decide(CONFIG, 4, SWAMPED, grown.memory, 111.0).target == 4


def test_a_moment_below_begins_the_wait_anew() -> None:
    memory = decide(CONFIG, 2, SWAMPED, Memory(), 0.0).memory
    memory = decide(CONFIG, 2, BUSY, memory, 9.0).memory
    assert decide(CONFIG, 2, SWAMPED, memory, 11.0).target == 2


def test_it_shrinks_one_at_a_time() -> None:
    assert after(59.0, CALM, 4).target == 4
    verdict = after(60.0, CALM, 4)
    assert verdict.target == 3
    assert decide(CONFIG, 3, CALM, verdict.memory, 161.0).target == 3


def test_it_does_not_shrink_to_where_it_would_grow_again() -> None:
    half = Signals(open_requests=5, queue_s=0.4)  # with one fewer of two: 0.8
    assert after(1000.0, half, 2).target == 2


def test_it_does_not_grow_while_instances_are_still_to_come() -> None:
    waiting = replace(SWAMPED, coming=1)
    assert after(1000.0, waiting, 4).target == 4
    first = decide(CONFIG, 4, waiting, Memory(), 0.0)
    assert decide(CONFIG, 4, SWAMPED, first.memory, 10.0).target == 4, "it is to be seen first"


def giver(name: str, instances: int = 2, under: float | None = 0.0, least: int = 1) -> Giver:
    config = AutoscaleConfig(min=least, max=8)
    return Giver(name, config, instances, Memory(under=under))


@pytest.mark.parametrize(
    ("givers", "chosen"),
    [
        ([], None),
        ([giver("d")], "d"),
        ([giver("d", under=None)], None),
        ([giver("d", under=90.5)], None),
        ([giver("d", instances=1)], None),
        ([giver("d", instances=1, least=0)], None),
        ([giver("d", instances=3, least=3)], None),
        ([giver("d", under=50.0), giver("e", under=20.0), giver("f", under=80.0)], "e"),
    ],
)
def test_a_place_is_given_by_who_has_long_had_one_too_many(
    givers: list[Giver], chosen: str | None
) -> None:
    found = giver_for(CONFIG, givers, 100.0)
    assert (found.pool if found else None) == chosen


@given(st.floats(0.0, 4.0), st.integers(2, 8), st.integers(1, 7), st.floats(0.0, 4.0))
def test_a_place_does_not_swing_back_while_the_load_stays(
    taker_load: float, takers: int, givers: int, giver_load: float
) -> None:
    """The load is what one instance would be under; its share of n instances is an n-th."""

    def view(name: str, load: float, instances: int) -> Giver:
        signals = Signals(open_requests=1, queue_s=load / instances)
        memory = decide(CONFIG, instances, signals, Memory(), 0.0).memory
        return Giver(name, CONFIG, instances, memory)

    before = view("taker", taker_load * takers, takers)
    if before.memory.over is None:
        return  # it does not ask
    from_whom = giver_for(CONFIG, [view("giver", giver_load * givers, givers)], 1e6)
    if from_whom is None:
        return
    taker = view("taker", taker_load * takers, takers + 1)
    giver = view("giver", giver_load * givers, givers - 1)
    assert giver.memory.over is None, "the giver does not ask for it back"
    assert giver_for(CONFIG, [taker], 1e6) is None, "nor would the taker give it"


def test_the_bounds_hold_at_once() -> None:
    assert decide(CONFIG, 0, CALM, Memory(), 0.0).target == 1
    assert decide(CONFIG, 9, SWAMPED, Memory(), 0.0).target == 8


def test_an_idle_pool_may_go_away_and_comes_back_with_the_first_request() -> None:
    config = AutoscaleConfig(min=0, max=2, idle_after_s=300.0)
    assert after(299.0, Signals(), 1, config).target == 1
    assert after(300.0, Signals(), 1, config).target == 0
    assert after(300.0, Signals(open_requests=1), 1, config).target == 1
    assert decide(config, 0, Signals(), Memory(), 0.0).target == 0
    assert decide(config, 0, Signals(open_requests=1), Memory(), 0.0).target == 1


@pytest.mark.parametrize("wrong", [{"min": 3, "max": 2}, {"min": 2}, {"shrink_under": 1.0}])
def test_bounds_that_cross_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidConfig, match=r"than grow_over|least min"):
        AutoscaleConfig.checked(**wrong)


@given(
    st.integers(0, 12),
    st.lists(st.sampled_from([BUSY, SWAMPED, CALM, Signals()]), min_size=1, max_size=40),
    st.floats(0.1, 90.0),
)
def test_it_stays_within_its_bounds_and_never_more_than_doubles(
    instances: int, seen: list[Signals], every_s: float
) -> None:
    memory = Memory()
    for turn, signals in enumerate(seen):
        verdict = decide(CONFIG, instances, signals, memory, turn * every_s)
        assert verdict.reason
        assert CONFIG.min <= verdict.target <= CONFIG.max
        if CONFIG.min <= instances <= CONFIG.max:
            assert instances - 1 <= verdict.target <= 2 * instances
        instances, memory = verdict.target, verdict.memory
