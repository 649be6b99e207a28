"""A gateway goes on with the last membership while nobody tells it a later one."""

import asyncio

import pytest

from baton.cluster import membership_feed
from baton.core.errors import Unavailable
from baton.core.topology import Membership, MembershipBoard
from tests.cluster.worlds import D, info


async def test_it_keeps_the_last_answer_and_asks_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership_feed, "FIRST_PAUSE_S", 0.001)
    one = info(D.instance("decode-0"))  # type: ignore[arg-type]
    other = info(D.instance("other-0"))  # type: ignore[arg-type]
    answers: asyncio.Queue[Membership | None] = asyncio.Queue()
    asked: list[int] = []

    async def ask(version: int) -> Membership:
        asked.append(version)
        answer = await answers.get()
        if answer is None:
            raise Unavailable("no controller")
        return answer

    board = MembershipBoard(Membership(-1))
    feed = asyncio.create_task(membership_feed.follow(board, ask))
    async with asyncio.timeout(20):
        answers.put_nowait(Membership(0))
        assert (await board.newer_than(-1)).instances == ()
        answers.put_nowait(Membership(4, (one,)))
        assert (await board.newer_than(0)).instances == (one,)
        for answer in (None, None, Membership(4, (one,)), Membership(3)):
            answers.put_nowait(answer)
        answers.put_nowait(Membership(1001, (one, other)))
        assert (await board.newer_than(4)).version == 1001
        while len(asked) < 8:  # the feed asks on in its own task
            await board.newer_than(0)
            await asyncio.sleep(0)
    feed.cancel()
    assert asked == [-1, 0, 4, 4, 4, 4, 4, 1001], "errors and what is not later change nothing"
