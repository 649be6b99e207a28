"""A loss counts only for a process that knows that it is not itself the one that is cut off."""

import asyncio
from pathlib import Path

import pytest

from baton.cluster.instance import Instance
from baton.cluster.plan import Wish
from baton.cluster.watch import Watch, always
from baton.core.errors import InstanceLost
from baton.core.ids import InstanceId
from baton.core.topology import MembershipBoard, Role

from .worlds import info

PATIENCE_S = 60.0
INFO = info(Wish("decode", Role.DECODE, 1, "a").instance(InstanceId("decode-0")))


def instance() -> Instance:
    """Return one without processes: it ends when it is given up."""
    return Instance(INFO.instance_id, 0, Path("none"), lambda line: None)


async def started(watch: Watch, watched: Instance) -> "asyncio.Task[None]":
    """Return the wait for its end, once it waits."""
    waiting = asyncio.create_task(watch.ended(INFO, watched))
    while INFO.instance_id not in repr(watch):
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    return waiting


async def test_a_loss_is_told() -> None:
    watched = instance()
    waiting = await started(Watch(MembershipBoard(), None, always), watched)
    watched.give_up(InstanceLost("it is silent"))
    with pytest.raises(InstanceLost, match="it is silent"):
        await asyncio.wait_for(waiting, PATIENCE_S)


async def test_who_is_cut_off_gives_nobody_up_until_it_is_not() -> None:
    asked = asyncio.Event()
    rules = False

    async def rule() -> bool:
        asked.set()
        return rules

    watched = instance()
    waiting = await started(Watch(MembershipBoard(), None, rule), watched)
    watched.give_up(InstanceLost("nobody can be reached"))
    await asyncio.wait_for(asked.wait(), PATIENCE_S)
    assert not waiting.done()
    rules = True
    async with asyncio.timeout(PATIENCE_S):
        while not waiting.done():
            watched.give_up(InstanceLost("it alone is silent"))
            await asyncio.sleep(0.05)
    with pytest.raises(InstanceLost, match="it alone is silent"):
        await waiting
