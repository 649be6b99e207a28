"""The leader's side, with ranks that are scripted over real connections."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from baton.core.config import HandoverConfig, ParallelConfig, WorkerConfig
from baton.core.errors import DeadlineExceeded, InstanceLost, InvalidConfig, WrongKV
from baton.core.ids import BlockId, Incarnation, SeqId
from baton.core.request import SamplingParams, TokenLogprobs
from baton.core.topology import Role
from baton.engine.step import ScheduledSequence, StepPlan, StepResult
from baton.engine.step_diff import StepDecoder
from baton.executor import rank_group
from baton.executor.control_link import ControlLink, connect
from baton.executor.control_messages import packed_error, packed_result
from baton.executor.rank_group import ALL_LAYERS, RankGroup, rank_name
from baton.kv_transfer.link.auth import Parties

PATIENCE_S = 60.0
SECRET = "a secret of this cluster"


def config(size: int, **limits: float) -> WorkerConfig:
    return WorkerConfig(
        instance_id="decode-0",
        role=Role.MIXED,
        model_dir=Path("none"),
        model_name="none",
        parallel=ParallelConfig(tp=size, **{"silence_s": 1000.0, **limits}),
        handover=HandoverConfig(secret=SECRET),
    )


class Rank:
    """Another rank: answers calls by what it is told to, and keeps the plans that it gets."""

    def __init__(self, group: RankGroup, rank: int, answer: Callable[..., Any]) -> None:
        leader = group.leader
        parties = Parties(
            rank_name("decode-0", rank), leader.incarnation, "decode-0", leader.incarnation
        )
        connection = connect((leader.host, leader.port), SECRET.encode(), parties)
        self.plans: list[StepPlan] = []
        self._diffs = StepDecoder()
        self._answer = answer
        self.link = ControlLink(
            connection, silence_s=1000.0, on_message=self._heard, on_end=lambda _: None
        )
        self.thread = threading.Thread(target=self.link.run, daemon=True)
        self.thread.start()

    def _heard(self, message: Any) -> None:
        if message[0] == "step":
            self.plans.append(self._diffs.decode(message[1]))
            return
        _, number, method, arguments = message
        try:
            self.link.send(["answer", number, self._answer(method, *arguments), None])
        except WrongKV as error:
            self.link.send(["answer", number, None, packed_error(error)])


class World:
    """A group, its other ranks, and how it was lost."""

    def __init__(self, size: int, **limits: float) -> None:
        self.lost: asyncio.Queue[InstanceLost] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        self.group = RankGroup(
            config(size, **limits),
            Incarnation(7),
            on_lost=lambda error: loop.call_soon_threadsafe(self.lost.put_nowait, error),
        )
        self.ranks: list[Rank] = []

    async def add(self, rank: int, answer: Callable[..., Any] = lambda *_: None) -> Rank:
        self.ranks.append(await asyncio.to_thread(Rank, self.group, rank, answer))
        return self.ranks[-1]

    async def why(self) -> str:
        return str(await asyncio.wait_for(self.lost.get(), PATIENCE_S))


@pytest.fixture
async def make_world() -> AsyncIterator[Callable[..., World]]:
    worlds: list[World] = []

    def make(size: int, **limits: float) -> World:
        worlds.append(World(size, **limits))
        return worlds[-1]

    yield make
    for world in worlds:
        await world.group.close()
        for rank in world.ranks:
            rank.link.close()
            rank.thread.join(PATIENCE_S)


def plan(step: int) -> StepPlan:
    sequence = ScheduledSequence(SeqId(1), (5,), step, (BlockId(0),), True, SamplingParams())
    return StepPlan(step, (sequence,))


async def test_calls_go_to_all_ranks_and_answers_come_in_their_order(
    make_world: Callable[..., World],
) -> None:
    world = make_world(3)
    await world.add(2, lambda method, *arguments: [2, method, *arguments])
    await world.add(1, lambda method, *arguments: [1, method, *arguments])
    await world.group.join()
    assert await world.group.call_all("do", b"x", 3) == [[1, "do", b"x", 3], [2, "do", b"x", 3]]


async def test_an_error_of_a_rank_is_raised_once_all_have_answered(
    make_world: Callable[..., World],
) -> None:
    world, answered = make_world(3), threading.Event()

    def wrong(*_: Any) -> None:
        raise WrongKV("block 3")

    await world.add(1, wrong)
    await world.add(2, lambda *_: answered.set())
    await world.group.join()
    with pytest.raises(WrongKV, match="block 3"):
        await world.group.call_all("read")
    assert answered.is_set()


async def test_all_ranks_get_every_plan_and_one_has_the_result(
    make_world: Callable[..., World],
) -> None:
    world = make_world(2)
    rank = await world.add(1)
    await world.group.join()
    results = [world.group.begin(plan(step)) for step in range(3)]
    await world.group.call_all("answer, now that you have all plans")
    told = StepResult(0, {SeqId(1): 9}, {SeqId(1): TokenLogprobs(-0.5, ((9, -0.5), (2, -1.0)))})
    rank.link.send(["result", packed_result(told)])
    rank.link.send(["failed", 1, packed_error(WrongKV("not finite"))])
    first, second, third = results
    assert await asyncio.wait_for(asyncio.wrap_future(first), PATIENCE_S) == told
    with pytest.raises(WrongKV, match="not finite"):
        await asyncio.wait_for(asyncio.wrap_future(second), PATIENCE_S)
    assert not third.done()
    assert world.group.progress == world.group.steps_ended == (1, ALL_LAYERS)
    assert rank.plans == [plan(0), plan(1), plan(2)]


async def test_the_result_of_a_step_comes_from_all_places_along_ep(
    make_world: Callable[..., World],
) -> None:
    world = make_world(1, ep=2)
    rank = await world.add(1)
    await world.group.join()
    future = world.group.begin(plan(0))
    world.group.tell(0, StepResult(0, {SeqId(1): 9}))
    assert not future.done()
    rank.link.send(["result", packed_result(StepResult(0, {SeqId(2): 8}))])
    result = await asyncio.wait_for(asyncio.wrap_future(future), PATIENCE_S)
    assert result.tokens == {SeqId(1): 9, SeqId(2): 8}


async def test_counters_are_those_of_all_ranks_together(make_world: Callable[..., World]) -> None:
    world = make_world(3)
    one, two = await world.add(1), await world.add(2)
    await world.group.join()
    assert world.group.counters({"bytes_read_tcp": 1}) == {"bytes_read_tcp": 1}
    one.link.send(["counters", {"bytes_read_tcp": 10, "transfers_open": 3}])
    one.link.send(["counters", {"bytes_read_tcp": 20, "transfers_open": 0}])
    two.link.send(["counters", {"bytes_read_shm": 300}])
    await world.group.call_all("answer, now that you have told")
    found = world.group.counters({"bytes_read_tcp": 1, "transfers_open": 2})
    assert found == {"bytes_read_tcp": 21, "bytes_read_shm": 300, "transfers_open": 2}


async def test_a_rank_that_ends_ends_the_instance(make_world: Callable[..., World]) -> None:
    world = make_world(3)
    await world.add(1)
    other = await world.add(2)
    await world.group.join()
    other.link.close()
    assert await world.why() == "decode-0 cannot go on: rank 2 is lost: its connection ended"


async def test_a_rank_that_is_silent_ends_the_instance(
    make_world: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world(2, silence_s=2.0)
    await world.add(1)
    assert "rank 1 is lost: it has been silent for 2 s" in await world.why()


async def test_a_step_without_progress_ends_the_instance(
    make_world: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank_group, "TICK_S", 0.01)
    world = make_world(2, step_timeout_s=0.05)
    await world.add(1)
    await world.group.join()
    world.group.begin(plan(4))
    assert "step 4 has made no progress for 0.05 s" in await world.why()


async def test_ranks_that_do_not_come_are_named(make_world: Callable[..., World]) -> None:
    world = make_world(4, join_timeout_s=0.2)
    await world.add(2)
    with pytest.raises(DeadlineExceeded, match=r"0.2 s: decode-0/1, decode-0/3"):
        await world.group.join()


async def test_ranks_need_a_secret() -> None:
    without = config(2).model_copy(update={"handover": HandoverConfig()})
    with pytest.raises(InvalidConfig, match=r"handover.secret.*more than one rank"):
        RankGroup(without, Incarnation(7))


async def test_an_instance_of_one_rank_has_nobody_to_wait_for() -> None:
    group = RankGroup(config(1), Incarnation(7))
    await group.join()
    assert await group.call_all("anything") == []
    await group.close()
