"""An instance's side of its lease: takes beats, and fences itself when nobody renews it."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

from baton.core.clock import Clock, monotonic
from baton.core.errors import DeadlineExceeded
from baton.core.ids import Incarnation
from baton.core.lease import Beat, Lease, Leave, Progress, Report, Standing
from baton.core.log import get_logger

_log = get_logger("lease")


class Leased:
    """Run `watch` as a task: it calls `fence` when the lease has ended, and `serve` after that.

    What is renewed once all has been given back serves again: nothing but its requests is lost, and
    these have gone on elsewhere.
    """

    def __init__(
        self,
        incarnation: Incarnation,
        *,
        report: Callable[[], Report],
        busy: Callable[[], bool],
        fence: Callable[[], Awaitable[None]],
        serve: Callable[[], None],
        stall_s: float,
        clock: Clock = monotonic,
    ) -> None:
        """`report` says how the instance is, but for its standing; `busy` whether a step runs.

        `fence` refuses what is new, ends what is open, and returns once it is given back, or raises
        DeadlineExceeded and is asked again; `serve` takes that back. After `stall_s` in one step no
        beat counts: the model is stuck.
        """
        self.incarnation = incarnation
        self.fenced = False
        self._report = report
        self._busy = busy
        self._fence = fence
        self._serve = serve
        self._clock = clock
        self._lease = Lease()
        self._progress = Progress(stall_s)
        self._changed = asyncio.Event()

    def __repr__(self) -> str:
        return f"Leased({self._lease}, fenced={self.fenced})"

    @property
    def epoch(self) -> int:
        """The highest membership version that a granter has named."""
        return self._lease.epoch

    def beat(self, beat: Beat) -> Report:
        """See LeaseHolder."""
        now, report = self._clock(), self._report()
        if self._progress.seen(report.steps, busy=self._busy(), now=now):
            self._lease.beat(beat, now)
            self._changed.set()
        standing = Standing.FENCED if self.fenced else self._lease.standing(now)
        return replace(report, standing=standing, epoch=self._lease.epoch)

    def left(self, last: Beat, leave: Leave) -> None:
        """See LeaseHolder."""
        _log.info("a granter leaves", granter=last.granter, how=str(leave))
        self._lease.left(last, leave, self._clock())
        self._changed.set()

    async def watch(self) -> None:
        """Follow the lease until cancelled."""
        while True:
            self._changed.clear()
            standing = self._lease.standing(self._clock())
            if standing is Standing.FENCED and not self.fenced:
                self.fenced = True
                _log.error("fenced: nobody has renewed the lease", lease=repr(self._lease))
                await self._fence_until_empty()
                continue  # it may have been renewed meanwhile
            if standing is not Standing.FENCED and self.fenced:
                self.fenced = False
                self._serve()
                _log.warning("serving again", lease=repr(self._lease))
            await self._until_change()

    async def _fence_until_empty(self) -> None:
        """Serve nobody before all is given back: whoever asks hears meanwhile that it is fenced."""
        while True:
            try:
                await self._fence()
            except DeadlineExceeded as error:
                _log.error("fenced, and not empty", reason=str(error))
            else:
                return

    async def _until_change(self) -> None:
        ends_at = None if self.fenced else self._lease.ends_at()
        try:
            async with asyncio.timeout(None if ends_at is None else ends_at - self._clock()):
                await self._changed.wait()
        except TimeoutError:
            pass
