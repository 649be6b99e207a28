import pytest

from baton.core.clock import ManualClock, monotonic


def test_a_manual_clock_moves_only_when_told():
    clock = ManualClock(5.0)
    assert clock() == clock() == 5.0
    clock.advance(1.5)
    assert clock() == 6.5
    with pytest.raises(AssertionError):
        clock.advance(-1)


def test_time_goes_forward():
    assert monotonic() <= monotonic()
