"""A loss counts only for a process that knows that it is not itself the one that is cut off."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from baton.api.lease_keeper import Terms
from baton.cluster import watch
from baton.cluster.instance import Instance
from baton.cluster.plan import Wish
from baton.cluster.watch import Watch, always
from baton.core.errors import InstanceLost
from baton.core.ids import InstanceId
from baton.core.topology import MembershipBoard, Role

from .worlds import info

PATIENCE_S = 60.0
INFO = info(Wish("decode", Role.DECODE, 1, "a", "m").instance(InstanceId("decode-0")))


def instance() -> Instance:
    """Return one without processes: it ends when it is given up."""
    return Instance(INFO.instance_id, 0, Path("none"), lambda line: None)


async def give_up_until(over: Callable[[], bool], watched: Instance, why: str) -> None:
    """Give it up, as often as it takes to be heard: it may not be waited for yet, or again."""
    async with asyncio.timeout(PATIENCE_S):
        while not over():
            watched.give_up(InstanceLost(why))
            await asyncio.sleep(0.01)


async def test_a_loss_is_told() -> None:
    watched = instance()
    watched_by = Watch(MembershipBoard(), None, always)
    waiting = asyncio.create_task(watched_by.ended(INFO, watched))
    await give_up_until(waiting.done, watched, "it is silent")
    with pytest.raises(InstanceLost, match="it is silent"):
        await waiting


async def test_who_is_cut_off_gives_nobody_up_until_it_is_not() -> None:
    asked = asyncio.Event()
    rules = False

    async def rule() -> bool:
        asked.set()
        return rules

    watched = instance()
    watched_by = Watch(MembershipBoard(), None, rule)
    waiting = asyncio.create_task(watched_by.ended(INFO, watched))
    await give_up_until(asked.is_set, watched, "nobody can be reached")
    assert not waiting.done()
    rules = True
    await give_up_until(waiting.done, watched, "it alone is silent")
    with pytest.raises(InstanceLost, match="it alone is silent"):
        await waiting


async def test_who_is_cut_off_renews_no_lease_until_it_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watch, "_PAUSE_S", 0.001)
    rules = True

    async def rule() -> bool:
        return rules

    watching = Watch(MembershipBoard(), Terms("controller/1", controls=True), rule)
    leases = watching._leases
    assert leases is not None
    running = asyncio.create_task(watching.run())
    async with asyncio.timeout(PATIENCE_S):
        for rules in (False, True):
            while leases.grants is not rules:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
    running.cancel()
    await asyncio.wait({running})
