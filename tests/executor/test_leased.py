"""An instance fences itself when nobody renews its lease, and serves again when somebody does."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from baton.core.errors import DeadlineExceeded
from baton.core.ids import Incarnation
from baton.core.lease import Beat, Leave, Report, Standing
from baton.executor.leased import Leased

SECONDS = 30


class Instance:
    """Counts its fences; `gate` holds them up."""

    def __init__(self, stall_s: float = 60.0) -> None:
        self.fences = self.served = 0
        self.steps = 0
        self.busy = False
        self.full = False
        """The next fence finds something that does not leave in time."""
        self.gate = asyncio.Event()
        self.gate.set()
        self.now = 0.0
        self.leased = Leased(
            Incarnation(7),
            report=lambda: Report(Standing.FREE, steps=self.steps, waiting=3),
            busy=lambda: self.busy,
            fence=self.fence,
            serve=self.serve,
            stall_s=stall_s,
            clock=lambda: self.now,
        )

    async def fence(self) -> None:
        self.fences += 1
        if self.full:
            self.full = False
            raise DeadlineExceeded("1 are still open")
        await self.gate.wait()

    def serve(self) -> None:
        self.served += 1

    def beat(self, lease_s: float = 1000.0) -> Report:
        return self.leased.beat(Beat("gateway", 4, lease_s))


@asynccontextmanager
async def watched(instance: Instance) -> AsyncIterator[Instance]:
    task = asyncio.create_task(instance.leased.watch())
    try:
        async with asyncio.timeout(SECONDS):
            yield instance
    finally:
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled()


async def until(fenced: bool, instance: Instance) -> None:
    while instance.leased.fenced is not fenced:  # noqa: ASYNC110  (there is no event for it)
        await asyncio.sleep(0)


async def test_a_beat_is_answered_with_how_it_is() -> None:
    async with watched(Instance()) as instance:
        assert instance.beat() == Report(Standing.HELD, epoch=4, waiting=3)
        assert instance.leased.epoch == 4


async def test_it_fences_itself_when_the_lease_ends_and_serves_again_when_it_is_renewed() -> None:
    async with watched(Instance()) as instance:
        instance.beat(lease_s=0.0)
        await until(True, instance)
        assert instance.fences == 1
        assert instance.beat().standing is Standing.FENCED  # not before it has looked around
        await until(False, instance)
        assert instance.served == 1
        assert instance.beat().standing is Standing.HELD


async def test_the_lease_ends_by_the_clock_alone() -> None:
    async with watched(Instance()) as instance:
        instance.beat(lease_s=0.02)  # from now on nobody says anything
        for _ in range(10):
            await asyncio.sleep(0)
            assert not instance.leased.fenced
        instance.now = 0.02
        await until(True, instance)


async def test_it_does_not_serve_before_all_has_been_given_back() -> None:
    async with watched(Instance()) as instance:
        instance.gate.clear()
        instance.beat(lease_s=0.0)
        await until(True, instance)
        instance.beat()
        for _ in range(10):
            await asyncio.sleep(0)
            assert instance.leased.fenced
        instance.gate.set()
        await until(False, instance)
        assert instance.fences == 1


async def test_it_fences_again_until_it_is_empty() -> None:
    async with watched(Instance()) as instance:
        instance.full = True
        instance.gate.clear()
        instance.beat(lease_s=0.0)
        while instance.fences < 2:  # noqa: ASYNC110  (there is no event for it)
            await asyncio.sleep(0)
        instance.beat()
        assert instance.leased.fenced
        instance.gate.set()
        await until(False, instance)


async def test_beats_do_not_count_while_the_model_is_stuck() -> None:
    async with watched(Instance(stall_s=5.0)) as instance:
        instance.busy = True
        assert instance.beat(lease_s=3.0).standing is Standing.HELD
        instance.now = 4.0
        assert instance.beat(lease_s=3.0).standing is Standing.HELD
        instance.now = 6.0  # the same step for six seconds
        instance.beat(lease_s=3.0)
        instance.now = 8.0
        assert instance.beat(lease_s=3.0).standing is Standing.FENCED
        instance.steps += 1
        assert instance.beat(lease_s=3.0).standing is Standing.HELD


async def test_who_is_replaced_is_fenced_for_good() -> None:
    async with watched(Instance()) as instance:
        instance.beat()
        instance.leased.left(Beat("gateway", 4, 0.0), Leave.REVOKE)
        await until(True, instance)
        assert instance.beat().standing is Standing.FENCED
        await asyncio.sleep(0)
        assert instance.leased.fenced
