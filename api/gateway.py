"""The front door behind both APIs: route a request, submit it, and stream its text back."""

import asyncio
import contextlib
import itertools
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass, replace
from random import Random
from typing import Any, Self

from baton.api.decode_session import SessionStats
from baton.api.event_follower import EventFollower
from baton.api.identity import Identity
from baton.api.journey import Journey, JourneyHost
from baton.api.latency import RecentLatency
from baton.api.lease_keeper import LeaseKeeper, Terms
from baton.api.open_request import OpenRequest
from baton.api.planner import Planner
from baton.api.sessions import Sessions
from baton.api.status import StatusView, status_of
from baton.api.text_stream import Piece, TextStream
from baton.api.traces import KeptTrace, TraceLog
from baton.api.validate import ServedModel, TextRequest, tool_format
from baton.api.waiting_room import Place, WaitingRoom
from baton.core import log
from baton.core.clock import Clock, monotonic
from baton.core.config import ClusterTlsConfig, GatewayConfig
from baton.core.errors import BatonError, InstanceLost, Overloaded, Unavailable, UnknownModel
from baton.core.metrics import GatewayMetrics, GatewayReading, InstanceReading
from baton.core.tasks import TaskSet
from baton.core.tenants import ANYBODY, Caller
from baton.core.topology import InstanceInfo, MembershipBoard, Role
from baton.core.trace import RequestTrace, is_traceparent
from baton.core.tracing import open_tracing
from baton.models.tokenizer import Tokenizer
from baton.router.admission import Admission, Want
from baton.router.admission_room import RoomLimits
from baton.router.router import Router, RouterStats
from baton.router.state import RouterState

_log = log.get_logger("gateway")

_RETRY_S = 5.0
"""For whoever finds too many waiting for an instance to start."""


@dataclass(frozen=True, slots=True)
class GatewayStats:
    """A snapshot."""

    open_requests: int
    """Admitted, and not over on both sides: decode instance and consumer."""
    prompt_tokens: int
    """Of all requests admitted since the gateway began."""
    output_tokens: int
    """Generated since the gateway began, for requests that are open too."""
    waiting: int
    """Requests that can go on only once there is a decode instance."""
    queued: int
    """Requests that wait for their turn: the instances have no room."""
    ttft_s: float | None
    """90th percentile, over the requests of the last minute."""
    tpot_s: float | None
    """Likewise."""
    traces: int
    router: RouterStats
    sessions: tuple[SessionStats, ...]


class Gateway:
    """One per process; on one event loop. Use it as a context manager, or start and close it."""

    def __init__(
        self,
        config: GatewayConfig,
        tokenizer: Tokenizer,
        model_name: str,
        board: MembershipBoard,
        metrics: GatewayMetrics,
        *,
        expects_prefill: bool,
        may_be_empty: bool = False,
        beside_others: bool = False,
        tls: ClusterTlsConfig | None = None,
        clock: Clock = monotonic,
    ) -> None:
        """`expects_prefill`: the cluster was started with prefill instances (see `health`).

        `may_be_empty`: with nothing to do there is no decode instance; one comes if a request waits
        for it, for `migration_wait_s` at most. `beside_others`: other gateways send requests to
        the same instances; among equals it draws lots, so that not all choose the same. `tls`: for
        the way to instances.

        Raises InvalidConfig if the file of API keys is not as it should be.
        """
        self.config = config
        self.model_name = model_name
        self.created = int(time.time())
        """Unix time at which serving began."""
        self.metrics = metrics
        self.identity = Identity(config.api_keys, lambda: metrics.reload_failed("api_keys"))
        self._tokenizer = tokenizer
        self._tool_format = tool_format(config.tool_parser, tokenizer)
        self._board = board
        self._expects_prefill = expects_prefill
        self._may_be_empty = may_be_empty
        self._clock = clock
        state = RouterState(config.index_blocks)
        self._room = WaitingRoom(
            Admission(
                max_queued=config.max_queued_requests,
                queue_timeout_s=config.queue_timeout_s,
                clock=clock,
            ),
            is_served=self._has_decode,
            metrics=metrics,
            clock=clock,
        )
        self._room_limits = RoomLimits(config.decode_fill, config.prefill_ahead_s)
        self._follower = EventFollower(board, state, on_told=self._room.poke, tls=tls)
        self._router = Router(
            max_open_requests=config.max_open_requests,
            clock=clock,
            state=state,
            salt=secrets.token_hex(8) if beside_others else "",
            rng=Random() if beside_others else None,
            decisions_kept=config.traces_kept,
            on_room=self._room.poke,
        )
        self._leases = LeaseKeeper(
            board,
            Terms(
                f"gateway/{secrets.token_hex(8)}",
                lease_s=config.lease_s,
                beat_s=config.lease_s / 3,
            ),
            on_lost=self._lost,
            on_live=self._live,
            clock=clock,
            tls=tls,
        )
        self._sessions = Sessions(
            board,
            takes_requests=self._leases.takes_requests,
            connect_timeout_s=config.connect_timeout_s,
            max_unsent=2 * config.max_open_requests,
            clock=clock,
            tls=tls,
        )
        self._traces = TraceLog(config.traces_kept)
        self._latency = RecentLatency(clock)
        self._tasks = TaskSet()
        self._journeys = JourneyHost(self._sessions, config, self._tasks, clock)
        self._open: dict[OpenRequest, Place] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._closing = False
        self._waiting = 0
        """Requests that are not admitted yet: there is no decode instance."""
        self._max_model_len = 0
        self._prompt_tokens = 0
        self._output_tokens = 0
        """Of requests that are over."""
        metrics.watch(self.reading)
        self._tracing = open_tracing(config.otlp_endpoint)

    async def start(self) -> None:
        """Connect to the decode instances that are listed; those that come later follow."""
        self._tasks.start(self._leases.run())
        self._tasks.start(self._sessions.run())
        self._tasks.start(self._follower.run())
        self._tasks.start(self._look_at_changes())
        await self._sessions.settled.wait()

    async def drain(self, timeout_s: float) -> None:
        """Admit nothing more, and give what is open `timeout_s` seconds to end.

        What waits for its turn is refused: another gateway can still take it.
        """
        self._closing = True
        self._room.close()
        self._sessions.tell_change()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()

    async def close(self, timeout_s: float = 5.0) -> None:
        """End every session, and with it every open request; wait until its consumer has left."""
        self._closing = True
        await self._tasks.drain(0)
        await self._leases.close()
        await self.drain(timeout_s)
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.close)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def some_decode(self) -> None:
        """Wait for a decode instance if there is none because there was nothing to do.

        Returns after `migration_wait_s` in any case: whoever needs one tells then that there is
        none. Raises Overloaded if too many wait already.
        """
        if not self._may_be_empty or self._has_decode():
            return
        if self._waiting + len(self._open) >= self.config.max_open_requests:
            raise Overloaded(f"{self._waiting} requests wait for a decode instance", _RETRY_S)
        self._waiting += 1
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.config.migration_wait_s):
                    while not (self._closing or self._has_decode()):
                        await self._sessions.changed()
        finally:
            self._waiting -= 1

    def _has_decode(self) -> bool:
        return bool(self._sessions.usable().of(Role.DECODE, Role.MIXED))

    def serves(self, caller: Caller, model: str | None = None) -> bool:
        """Return whether a model is served to this caller; by default the one that is served."""
        return (model or self.model_name) == self.model_name and caller.tenant.may_use(
            self.model_name
        )

    def model(self, caller: Caller) -> ServedModel:
        """Return what a caller's request is checked against.

        Raises UnknownModel if there is none for the caller, Unavailable until a decode instance has
        come.
        """
        if not self.serves(caller):
            raise UnknownModel("model", self.model_name, "a model that this key may use")
        decode = self._board.current.of(Role.DECODE, Role.MIXED)
        if decode:
            self._max_model_len = max(i.max_model_len for i in decode)
        if not self._max_model_len:
            raise Unavailable("no decode instance has been ready yet")
        return ServedModel(
            self.model_name,
            self._tokenizer,
            self._max_model_len,
            self._tool_format,
            caller.tenant,
        )

    def now(self) -> float:
        """Return the time on the gateway's clock."""
        return self._clock()

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes that one token stands for, perhaps only a part of a character."""
        return self._tokenizer.token_bytes(token)

    async def generate(self, request: TextRequest) -> AsyncGenerator[Piece, None]:
        """Yield a request's text as it becomes certain; the last piece has `finish` set.

        Close the generator (`contextlib.aclosing`) when the consumer goes away: the request is
        then cancelled on its decode instance at once. If that instance is lost or drains, the
        request goes on at its next token on another (see api/journey.py). Raises Overloaded,
        Unavailable, DeadlineExceeded, or what the decode instance tells.
        """
        request = self._traced(request)
        log.tag_request(request.generate.request_id, request.generate.traceparent)
        try:
            await self.some_decode()
            opened = await self._admit(request)
        except BatonError as error:
            self.metrics.refused(error.code)
            raise
        journey = Journey(opened, self._journeys)
        journey.start()
        try:
            async with aclosing(opened.pieces()) as pieces:
                async for piece in pieces:
                    yield piece
        finally:
            if opened.leave():
                journey.cancel()

    def cancel(self, request_id: str, caller: Caller) -> int:
        """End the open requests of that id, or of the call of that id; return how many there are.

        Whoever reads them gets Cancelled. Those of other tenants do not exist for the caller.
        """
        found = [
            opened
            for opened in self._open
            if opened.named(request_id) and caller.sees(opened.request.generate.tenant)
        ]
        return sum(opened.cancel() for opened in found)

    def _traced(self, request: TextRequest) -> TextRequest:
        """Return it with the span that the instances are to know: its own, or its caller's."""
        span = "" if request.arrival is None else request.arrival.traceparent
        if self._tracing is not None:
            span = self._tracing.begun(span)
        if not is_traceparent(span):  # the caller may have sent anything
            return request
        return replace(request, generate=replace(request.generate, traceparent=span))

    async def _admit(self, request: TextRequest) -> OpenRequest:
        if self._closing:
            raise Unavailable("the gateway is shutting down")
        generate = request.generate
        text = TextStream(
            request.detokenizer(self._tokenizer),
            stop=request.stop,
            stop_token_ids=generate.stop_token_ids,
            min_tokens=generate.sampling.min_tokens,
        )
        timeout_s = self.config.request_timeout_s
        if request.timeout_s is not None:
            timeout_s = min(timeout_s, request.timeout_s)
        came = self._clock()
        want = Want(
            tenant=self.identity.tenant(generate.tenant),
            prompt_tokens=len(generate.prompt),
            max_tokens=generate.max_tokens,
            deadline=came + timeout_s,
            priority=generate.priority,
        )
        place = await self._room.enter(
            want, Planner(self._router, self._sessions.usable, self._room_limits, request)
        )
        waited_s = self._clock() - came
        opened = OpenRequest(  # nothing may fail from here on: somebody must give the place back
            request,
            place.lease,
            text,
            clock=self._clock,
            timeout_s=timeout_s,
            waited_s=waited_s,
            on_over=self._over,
        )
        self._open[opened] = place
        self._idle.clear()
        self._prompt_tokens += len(generate.prompt)
        self.metrics.opened(len(generate.prompt), waited_s)
        return opened

    async def _look_at_changes(self) -> None:
        """Let those that wait look again whenever an instance comes, goes or is connected."""
        while True:
            await self._sessions.changed()
            self._room.poke()

    def _lost(self, instance: InstanceInfo, error: InstanceLost) -> None:
        self._sessions.lose(instance, error)

    def _live(self, instance: InstanceInfo) -> None:
        self._sessions.tell_change()  # its session may have been ready before

    def _over(self, opened: OpenRequest, trace: RequestTrace) -> None:
        place = self._open.pop(opened)
        self._room.left(place.turn, opened.received)
        self._output_tokens += opened.received
        self._traces.add(trace)
        self._latency.add(trace)
        self._router.ended(trace)
        self.metrics.closed(trace)
        _log_end(trace)
        if self._tracing is not None:
            self._tracing.ended(trace, time.time_ns())
        if not self._open:
            self._idle.set()

    def trace(self, request_id: str, caller: Caller = ANYBODY) -> RequestTrace | None:
        """Return the trace of a request that ended lately; of others' requests there is none."""
        trace = self._traces.get(request_id)
        return trace if trace is not None and caller.sees(trace.tenant) else None

    def newest_traces(self, caller: Caller, limit: int) -> Iterator[KeptTrace]:
        """Yield traces of requests that ended lately and that `caller` may see, newest first."""
        return self._traces.newest(caller.sees, limit)

    def explain(self, request_id: str, caller: Caller = ANYBODY) -> dict[str, Any] | None:
        """Return why a request went where it did, ready for JSON.

        None if that is forgotten, or if it is another tenant's.
        """
        told = self._router.explain(request_id)
        return told if told is not None and caller.sees(told["tenant"]) else None

    def health(self) -> list[str]:
        """Return the reasons why requests cannot be served as they should; none: healthy."""
        reasons = []
        usable = self._sessions.usable()
        if self._closing:
            reasons.append("the gateway is shutting down")
        if not (self._may_be_empty or usable.of(Role.DECODE, Role.MIXED)):
            reasons.append("no decode instance is ready")
        if self._expects_prefill and not usable.of(Role.PREFILL):
            reasons.append("no prefill instance is ready")
        return reasons

    async def idle(self) -> None:
        """Wait until no request is open."""
        await self._idle.wait()

    def check(self) -> None:
        """Assert that no request is open and that nothing is left of those that were.

        After `close` no task is left either.
        """
        assert not self._open, self._open
        self._room.check()
        self._router.check()
        router = self._router.stats()
        assert router.open_requests == 0, router
        assert not any(s.open_requests for s in self._sessions.stats()), self._sessions.stats()
        assert not self._tasks.crashed, self._tasks.crashed
        if self._closing:
            self._tasks.check()

    def reading(self) -> GatewayReading:
        """Return what is so now, of what metrics do not count as it happens."""
        membership, has_decode = self._board.current, self._has_decode()
        return GatewayReading(
            waiting=self._waiting + (0 if has_decode else len(self._open)),
            membership_version=membership.version,
            instances=tuple(
                InstanceReading(i.instance_id, i.role, self._leases.report(i))
                for i in membership.instances
            ),
        )

    def status(self, *, recent: int, sees: Callable[[RequestTrace], bool]) -> dict[str, Any]:
        """Return how everything is, for GET /v1/status; with requests that the caller may see."""
        reading, stats = self.reading(), self.stats()
        view = StatusView(
            clock_s=self._clock(),
            uptime_s=max(0.0, time.time() - self.created),
            model=self.model_name,
            membership=self._board.current,
            open_requests=len(self._open),
            waiting=reading.waiting,
            sessions=self._sessions.stats(),
            last_minute=self._latency.summary(),
            reports={i.instance_id: i.report for i in reading.instances},
            problems=self.health(),
            usable={i.instance_id for i in self._sessions.usable().instances},
            totals={
                "limit": self.config.max_open_requests,
                "admitted": stats.router.admitted,
                "refused": stats.router.overloaded + stats.router.unavailable,
                "prompt_tokens": stats.prompt_tokens,
                "output_tokens": stats.output_tokens,
            },
        )
        traces = (trace for trace in self._traces.latest() if sees(trace))
        return status_of(view, list(itertools.islice(traces, recent)))

    def stats(self) -> GatewayStats:
        """Return a snapshot."""
        return GatewayStats(
            open_requests=len(self._open),
            prompt_tokens=self._prompt_tokens,
            output_tokens=self._output_tokens + sum(o.received for o in self._open),
            waiting=self._waiting + (0 if self._has_decode() else len(self._open)),
            ttft_s=self._latency.ttft_s(),
            tpot_s=self._latency.tpot_s(),
            traces=len(self._traces),
            queued=len(self._room),
            router=self._router.stats(),
            sessions=self._sessions.stats(),
        )

    def __repr__(self) -> str:
        return f"Gateway({self.model_name}, open={len(self._open)})"


def _log_end(trace: RequestTrace) -> None:
    _log.info(
        "request ended",
        request=trace.request_id,
        outcome=trace.error or trace.finish,
        decode=trace.decode_instance,
        prompt_tokens=trace.prompt_tokens,
        output_tokens=trace.output_tokens,
        ttft_s=trace.ttft_s,
        e2e_s=trace.e2e_s,
    )
