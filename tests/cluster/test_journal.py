"""The journal: bounded, numbered, and waited for."""

import asyncio

import pytest

from baton.cluster.journal import Journal


async def test_events_are_numbered_and_waited_for() -> None:
    journal = Journal(logged=False)
    waiting = asyncio.create_task(journal.newer_than(0))
    await asyncio.sleep(0)
    assert not waiting.done()
    journal.add("start", "decode-0", "wanted")
    (event,) = await waiting
    assert (event.number, event.what, event.whom, event.reason) == (
        1,
        "start",
        "decode-0",
        "wanted",
    )
    assert await journal.newer_than(0) == (event,)
    assert journal.after(1) == ()


def test_only_the_latest_are_kept() -> None:
    journal = Journal(logged=False)
    for number in range(1500):
        journal.add("start", "decode-0", str(number))
    events = journal.after(0)
    assert (len(events), events[0].number, events[-1].number) == (1000, 501, 1500)
    assert journal.last == 1500


def test_what_is_logged_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    Journal(logged=True).add("start", "decode-0", "wanted")
    said = capsys.readouterr()  # on which of the two depends on whether logging was set up here
    [line] = (said.out + said.err).splitlines()
    assert "decode-0" in line


async def test_who_followed_another_controller_gets_all_of_this_one() -> None:
    journal = Journal(logged=False)
    journal.add("adopt", "decode-0", "it was there")
    assert [event.number for event in await journal.newer_than(57)] == [1]
