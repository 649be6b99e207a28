import asyncio

import pytest

from baton.core.errors import DeadlineExceeded, Draining, InvalidRequest, Overloaded
from baton.executor.admission import Admission

LONG_S = 600.0


@pytest.fixture
def admission() -> Admission:
    return Admission("decode-0", limit=2)


def never() -> int:
    pytest.fail("nothing was to be handed over")


async def test_as_many_as_allowed_may_enter(admission):
    admission.enter()
    admission.enter()
    with pytest.raises(Overloaded, match="2 requests are open in decode-0"):
        admission.enter()
    admission.leave()
    admission.enter()


async def test_who_is_inside_may_finish_and_nobody_else_enters(admission):
    admission.enter()
    drain = asyncio.create_task(admission.drain(LONG_S, never))
    await asyncio.sleep(0)
    with pytest.raises(Draining, match="decode-0 is about to leave"):
        admission.enter()
    assert not drain.done()
    admission.leave()
    assert await drain == 0
    with pytest.raises(Draining):
        admission.enter()


async def test_what_is_left_at_the_deadline_is_handed_over(admission):
    admission.enter()
    admission.enter()

    def hand_over() -> int:
        admission.leave()
        admission.leave()
        return 2

    assert await admission.drain(0.0, hand_over) == 2


async def test_nothing_open_needs_no_hand_over(admission):
    assert await admission.drain(0.0, never) == 0
    assert await admission.drain(LONG_S, never) == 0


async def test_a_caller_that_goes_away_calls_nothing_off(admission):
    admission.enter()
    handed_over = asyncio.Event()

    def hand_over() -> int:
        admission.leave()
        handed_over.set()
        return 1

    drain = asyncio.create_task(admission.drain(0.001, hand_over))
    await asyncio.sleep(0)
    drain.cancel()
    async with asyncio.timeout(10):
        await handed_over.wait()
    assert admission.draining


async def test_the_earliest_deadline_counts(admission):
    admission.enter()

    def hand_over() -> int:
        admission.leave()
        return 1

    patient = asyncio.create_task(admission.drain(LONG_S, never))
    await asyncio.sleep(0)
    assert await admission.drain(0.0, hand_over) == 1
    assert await patient == 1, "both tell what became of it"


@pytest.mark.parametrize("deadline_s", [-1.0, float("nan"), float("inf")])
async def test_a_deadline_that_makes_no_sense_changes_nothing(admission, deadline_s):
    with pytest.raises(InvalidRequest, match="deadline_s"):
        await admission.drain(deadline_s, never)
    assert not admission.draining


async def test_what_was_ended_and_does_not_leave_is_told(admission, monkeypatch):
    monkeypatch.setattr("baton.executor.admission._LEAVE_S", 0.01)
    admission.enter()
    with pytest.raises(DeadlineExceeded, match="1 are still open in decode-0"):
        await admission.drain(0.0, lambda: 1)


async def test_a_fence_that_something_does_not_leave_is_told(
    admission: Admission, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("baton.executor.admission._LEAVE_S", 0.01)
    admission.enter()
    with pytest.raises(DeadlineExceeded, match="1 are still open in decode-0"):
        await admission.fence(lambda: 1)
    assert admission.fenced
    admission.leave()
    await admission.fence(never)
