"""Keeps the leases of all instances that a membership lists, and hears how each of them is.

Whoever gives an instance work or decides on its life renews its lease: each gateway, and the
controller. Who gets no answer for as long as a lease lasts gives the instance up, as the instance
then gives itself up: neither has to hear of the other for that.
"""

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import grpc

from baton.core.clock import Clock, monotonic
from baton.core.config import ClusterTlsConfig
from baton.core.errors import BatonError, HandoverError, InstanceLost
from baton.core.lease import Beat, Leave, Report, Standing
from baton.core.log import get_logger
from baton.core.topology import InstanceInfo, Membership, MembershipBoard
from baton.proto import lease_pb2 as pb
from baton.proto.convert_lease import beat_proto, report_core
from baton.proto.errors import from_rpc_error
from baton.proto.grpc_runtime import open_channel
from baton.proto.lease_pb2_grpc import LeaseStub
from baton.router.load import InstanceKey, key_of

_PAUSE_S = 0.25
"""Before a broken stream is opened again."""
_LEAVE_TIMEOUT_S = 1.0

_log = get_logger("leases")
_Call = grpc.aio.StreamStreamCall[pb.Beat, pb.Report]
OnLost = Callable[[InstanceInfo, InstanceLost], None]
OnLive = Callable[[InstanceInfo], None]


@dataclass(frozen=True, slots=True)
class Terms:
    """How a granter grants."""

    granter: str
    """Its name and incarnation."""
    controls: bool = False
    """It is the controller."""
    lease_s: float = 3.0
    beat_s: float = 1.0


class LeaseKeeper:
    """Start `run()` as a task; `close` says goodbye, a cancellation does not."""

    def __init__(
        self,
        board: MembershipBoard,
        terms: Terms,
        *,
        on_lost: OnLost,
        on_live: OnLive = lambda instance: None,
        clock: Clock = monotonic,
        tls: ClusterTlsConfig | None = None,
    ) -> None:
        """`on_lost` hears of an instance once per loss: it has not answered, or is fenced.

        `on_live` hears of one that answers and serves, for the first time or again.
        """
        self._board = board
        self.terms = terms
        self._on_lost = on_lost
        self._on_live = on_live
        self._clock = clock
        self.tls = tls
        self._streams: dict[InstanceKey, _Stream] = {}
        self._closing = False
        self.flaps = 0
        """Leases that had lapsed and were taken up again by the same life of an instance."""
        self._granting = asyncio.Event()
        self._granting.set()

    def __repr__(self) -> str:
        return f"LeaseKeeper({self.terms.granter}, instances={len(self._streams)})"

    def report(self, instance: InstanceInfo) -> Report | None:
        """Return what a live instance said last; None if it is not live."""
        stream = self._streams.get(key_of(instance))
        return stream.report if stream is not None and stream.heard else None

    def takes_requests(self, instance: InstanceInfo) -> bool:
        """Return whether an instance may be used: it is not lost, and does not drain.

        One that has never been heard of counts as there.
        """
        stream = self._streams.get(key_of(instance))
        if stream is None or stream.report is None:
            return True
        return stream.live and not stream.report.draining

    async def run(self) -> None:
        """Follow the membership until cancelled, or closed."""
        async with asyncio.TaskGroup() as group:
            version = -1
            while not self._closing:
                membership = await self._board.newer_than(version)
                version = membership.version
                self._follow(membership, group)

    def pause(self) -> None:
        """Grant nothing until `resume`: who may be cut off must keep nobody alive on its side."""
        self._granting.clear()

    def resume(self) -> None:
        """Grant again; who was left to fence itself meanwhile is not lost if it serves again."""
        self._granting.set()

    @property
    def grants(self) -> bool:
        """Whether beats are sent."""
        return self._granting.is_set()

    async def until_granting(self) -> None:
        """Wait until beats are sent."""
        await self._granting.wait()

    def now(self) -> float:
        """Return the time on the keeper's clock."""
        return self._clock()

    @property
    def epoch(self) -> int:
        """The version of the membership that is gone by."""
        return self._board.current.version

    def lost(self, instance: InstanceInfo, error: InstanceLost) -> None:
        """Hear from a stream that an instance is lost."""
        self._on_lost(instance, error)

    def live(self, instance: InstanceInfo, *, again: bool) -> None:
        """Hear from a stream that an instance is live, perhaps after it was lost."""
        self.flaps += again
        self._on_live(instance)

    async def close(self) -> None:
        """Say goodbye to every instance: nothing of this granter's is open there any more."""
        self._closing = True
        live = [stream for stream in self._streams.values() if stream.live]
        await asyncio.gather(*(stream.leave(Leave.GOODBYE) for stream in live))

    def _follow(self, membership: Membership, group: asyncio.TaskGroup) -> None:
        listed = {key_of(i): i for i in membership.instances}
        places = {i.instance_id for i in membership.instances}
        for key in [key for key in self._streams if key not in listed]:
            stream = self._streams.pop(key)
            how = Leave.REVOKE if key[0] in places else Leave.WITHDRAW
            group.create_task(stream.leave(how))
        for key, instance in listed.items():
            if key not in self._streams:
                stream = _Stream(instance, self)
                self._streams[key] = stream
                stream.task = group.create_task(stream.keep())


class _Stream:
    """The lease of one instance."""

    def __init__(self, instance: InstanceInfo, keeper: LeaseKeeper) -> None:
        self.live = False
        """It has answered lately, and serves."""
        self.report: Report | None = None
        """The last one."""
        self.task: asyncio.Task[None] | None = None
        self._instance = instance
        self._keeper = keeper
        self._terms = keeper.terms
        self._answers = 0
        self._answered_at: float | None = None
        self._silent = False
        """The last stream ended because no answer came."""
        self._paused = False
        """No report has come since beats were paused, but perhaps that it is fenced."""
        self._lapsed = False
        """It was lost before."""
        self._excused_until: float | None = None
        """Until then it may say so: it was our pause."""

    @property
    def heard(self) -> bool:
        """Whether it is live, and what it said last is no older than a pause."""
        return self.live and not self._paused

    async def keep(self) -> None:
        """Hold one stream after the other, until cancelled."""
        while True:
            await self._keeper.until_granting()
            answered = self._answers
            error = await self._hold()
            if error is None:
                self._paused, self._excused_until = True, None
                continue
            # A connection may break; who cannot be reached by a new one is gone.
            if self._answers == answered or self._silent:
                self._lost(error)
                await asyncio.sleep(_PAUSE_S)

    async def leave(self, how: Leave) -> None:
        """Say how this granter goes, if there is a stream to say it on; nothing follows."""
        if self.task is not None:
            self.task.cancel()
            await asyncio.wait({self.task})
        with contextlib.suppress(TimeoutError, grpc.aio.AioRpcError, asyncio.InvalidStateError):
            async with (
                asyncio.timeout(_LEAVE_TIMEOUT_S),
                open_channel(self._instance.address, self._keeper.tls) as channel,
            ):
                call: _Call = LeaseStub(channel).Hold()
                await call.write(self._beat(how))
                await call.done_writing()
                await call.read()

    async def _hold(self) -> InstanceLost | None:
        """Beat until no answer comes, and return why; None if beats are to pause."""
        name, self._silent = self._instance.instance_id, False
        async with open_channel(self._instance.address, self._keeper.tls) as channel:
            call: _Call = LeaseStub(channel).Hold()
            try:
                while self._keeper.grants:
                    await self._beaten(call)
                    await asyncio.sleep(self._terms.beat_s)
                return None
            except TimeoutError:
                self._silent = True
                return InstanceLost(f"{name} does not answer for {self._terms.lease_s:g} s")
            except grpc.aio.AioRpcError as error:
                return InstanceLost(f"{name} cannot be reached: {from_rpc_error(error).message}")
            except BatonError as error:
                return InstanceLost(f"{name}: {error.message}")
            except Exception as bug:  # it must not end the leases of the others
                _log.exception("bug in a lease", instance=name)
                return InstanceLost(f"{name}: {bug!r}")
            finally:
                call.cancel()

    async def _beaten(self, call: _Call) -> None:
        """Send a beat and take its report; TimeoutError if none comes while a lease lasts.

        In three parts, so that after this process has itself stood still for as long, an answer
        that is there is seen.
        """
        exchange = asyncio.ensure_future(self._exchange(call))
        try:
            patience_s = self._patience_s()
            for _ in range(3):
                await asyncio.wait({exchange}, timeout=patience_s / 3)
                if exchange.done():
                    self._take(_result(exchange))
                    return
            raise TimeoutError
        finally:
            exchange.cancel()
            await asyncio.wait({exchange})

    def _patience_s(self) -> float:
        """Return how long to wait for an answer: a lease, of which silence took some already.

        The stream of a hung process breaks before its lease ends, and its kernel takes the next.
        """
        lease_s = self._terms.lease_s
        if self._answered_at is None:
            return lease_s
        silent_s = self._keeper.now() - self._answered_at - self._terms.beat_s
        return min(lease_s, max(lease_s / 3, lease_s - silent_s))

    async def _exchange(self, call: _Call) -> Report:
        await call.write(self._beat())
        message = await call.read()
        if not isinstance(message, pb.Report):
            raise HandoverError("it closed the stream")
        return report_core(message)

    def _beat(self, leave: Leave | None = None) -> pb.Beat:
        terms, epoch = self._terms, self._keeper.epoch
        beat = Beat(terms.granter, epoch, terms.lease_s, terms.controls)
        return beat_proto(beat, self._instance.incarnation, leave)

    def _take(self, report: Report) -> None:
        self._answers += 1
        self._answered_at = self._keeper.now()
        self.report = report
        if report.standing is not Standing.FENCED:
            self._paused = False
            if not self.live:
                self.live = True
                self._keeper.live(self._instance, again=self._lapsed)
            return
        if self._paused and self._excused():
            return
        why = "; ".join(report.problems) or "its lease had run out"
        self._lost(InstanceLost(f"{self._instance.instance_id} is fenced: {why}"))

    def _excused(self) -> bool:
        """Return whether it may be fenced for our pause: it has a lease's time to serve again."""
        now = self._keeper.now()
        if self._excused_until is None:
            self._excused_until = now + self._terms.lease_s
        return now <= self._excused_until

    def _lost(self, error: InstanceLost) -> None:
        if self.live:
            self.live, self._lapsed = False, True
            _log.warning("instance lost", instance=self._instance.instance_id, reason=str(error))
            self._keeper.lost(self._instance, error)


def _result(exchange: "asyncio.Future[Report]") -> Report:
    """Return the report; raises HandoverError for gRPC's other ways to say that a call is over."""
    if exchange.cancelled() or isinstance(exchange.exception(), asyncio.InvalidStateError):
        raise HandoverError("the stream was closed")
    return exchange.result()
