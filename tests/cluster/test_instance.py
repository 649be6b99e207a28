"""What ends one life of an instance; its calls through Ray are scripted."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from baton.cluster import rank_process, ray_calls
from baton.cluster.instance import Instance
from baton.core.errors import InstanceLost, InternalError, Unavailable
from baton.core.ids import InstanceId

MakeInstance = Callable[..., Instance]


@pytest.fixture
def make_instance(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> MakeInstance:
    """Make an instance whose actor answers each method by an async function of the same name."""
    monkeypatch.setattr(rank_process, "_PROBE_EVERY_S", 0.01)

    def make(ranks: int = 1, **answers: Callable[[], Any]) -> Instance:
        async def call(actor: object, method: str, *_: object, timeout_s: float = 0.0) -> Any:
            return await answers[method]()

        monkeypatch.setattr(ray_calls, "call", call)
        name = InstanceId("mixed-0")
        return Instance(name, ranks, tmp_path / "log", lambda line: None)

    return make


async def silent() -> None:
    await asyncio.Event().wait()


async def test_an_instance_that_does_not_answer_is_lost(make_instance: MakeInstance) -> None:
    instance = make_instance(wait_closed=silent, stats=silent)
    async with asyncio.timeout(20):
        with pytest.raises(InstanceLost, match="it does not answer"):
            await instance.ended()


async def test_an_instance_that_answers_lives_until_its_process_ends(
    make_instance: MakeInstance,
) -> None:
    ended, answers = asyncio.Event(), []

    async def wait_closed() -> None:
        await ended.wait()
        raise InstanceLost("its process ended")

    async def stats() -> dict[str, int]:
        answers.append(1)
        if len(answers) == 5:
            ended.set()
        if len(answers) == 3:
            raise InternalError("an error is an answer")
        return {}

    async with asyncio.timeout(20):
        with pytest.raises(InstanceLost, match="its process ended"):
            await make_instance(wait_closed=wait_closed, stats=stats).ended()
    assert len(answers) >= 5


async def test_it_asks_again_whether_it_is_closed(make_instance: MakeInstance) -> None:
    answers = iter([False, False, True])

    async def wait_closed() -> bool:
        return next(answers)

    async def stats() -> dict[str, int]:
        return {}

    async with asyncio.timeout(20):
        with pytest.raises(InstanceLost, match="its worker closed"):
            await make_instance(wait_closed=wait_closed, stats=stats).ended()
    assert list(answers) == []


async def test_one_without_processes_is_lost_whatever_it_is_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As one is that was to leave, and died, before a controller that starts afresh adopts it."""

    async def find_actor(name: str, timeout_s: float) -> Any:
        raise Unavailable("Ray did not answer")

    monkeypatch.setattr(ray_calls, "find_actor", find_actor)
    instance = Instance(InstanceId("mixed-0"), 1, tmp_path / "log", lambda line: None)
    with pytest.raises(InstanceLost, match="it has no process"):
        await instance.drain(1.0)
    with pytest.raises(InstanceLost, match="it has no process"):
        await instance.rank_stats(1.0)
    await instance.kill_named("mixed-0.1")


async def test_the_end_of_one_rank_is_that_of_the_instance(make_instance: MakeInstance) -> None:
    waits = 0

    async def wait_closed() -> None:
        nonlocal waits
        waits += 1
        if waits == 2:
            raise InstanceLost("its process ended")
        await silent()

    async def stats() -> dict[str, int]:
        return {}

    async with asyncio.timeout(20):
        with pytest.raises(InstanceLost, match="rank 1: its process ended"):
            await make_instance(2, wait_closed=wait_closed, stats=stats).ended()
