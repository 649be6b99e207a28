"""The front door behind both APIs: find a request's model, and stream its text back.

Each model has a lane of its own (api/model_lane.py). Here is what all of them share: who calls,
what tenants may use, metrics, traces, and the start and end of everything.
"""

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from baton.api.decode_session import SessionStats
from baton.api.identity import Identity
from baton.api.latency import RecentLatency
from baton.api.model_lane import LaneHost, LaneStats, ModelLane
from baton.api.model_names import ModelNames
from baton.api.peers import ALONE, Ended, Peers
from baton.api.status import ModelView, StatusView, status_of
from baton.api.text_stream import Piece
from baton.api.traces import KeptTrace, TraceLog
from baton.api.validate import ServedModel, TextRequest
from baton.core import log
from baton.core.clock import Clock, monotonic
from baton.core.config import ClusterTlsConfig, GatewayConfig
from baton.core.metrics import GatewayMetrics, GatewayReading
from baton.core.served_model import FrontModel, check_names
from baton.core.tasks import TaskSet
from baton.core.tenants import ANYBODY, Caller
from baton.core.topology import MembershipBoard
from baton.core.trace import RequestTrace, is_traceparent
from baton.core.tracing import open_tracing
from baton.models.tokenizer import Tokenizer
from baton.router.limits import TenantLimits

_log = log.get_logger("gateway")

_LEAST_INDEX = 1 << 10
"""Blocks of a lane's index, however many models share it."""


@dataclass(frozen=True, slots=True)
class GatewayStats:
    """A snapshot: of all models together, and of each by its name."""

    open_requests: int
    prompt_tokens: int
    output_tokens: int
    waiting: int
    queued: int
    traces: int
    sessions: tuple[SessionStats, ...]
    models: Mapping[str, LaneStats]


class Gateway:
    """One per process; on one event loop. Use it as a context manager, or start and close it."""

    def __init__(
        self,
        config: GatewayConfig,
        models: Mapping[FrontModel, Tokenizer],
        board: MembershipBoard,
        metrics: GatewayMetrics,
        *,
        beside_others: bool = False,
        tls: ClusterTlsConfig | None = None,
        peers: Peers = ALONE,
        clock: Clock = monotonic,
    ) -> None:
        """`models` are those that are served; `board` lists the instances of all of them.

        `beside_others`: other gateways send requests to the same instances; among equals it draws
        lots, so that not all choose the same. `tls`: for the way to instances. `peers`: the way to
        other gateways, and what they call this one.

        Raises InvalidConfig if the file of API keys is not as it should be, or a name is of two.
        """
        check_names(models)
        self.config = config
        self.created = int(time.time())
        """Unix time at which serving began."""
        self.metrics = metrics
        self.peers = peers
        self.identity = Identity(config.api_keys, lambda: metrics.reload_failed("api_keys"))
        self._board = board
        self._clock = clock
        self._limits = TenantLimits(clock)
        self._traces = TraceLog(config.traces_kept)
        self._latency = RecentLatency(clock)
        self._tasks = TaskSet()
        self._closing = False
        host = LaneHost(
            config,
            metrics,
            self._limits,
            self.identity.tenant,
            self._tasks,
            clock,
            index_blocks=max(_LEAST_INDEX, config.index_blocks // len(models)),
            on_left=self._left,
            on_ended=self._ended,
            beside_others=beside_others,
            tls=tls,
            name=peers.name,
        )
        self.models = ModelNames(
            ModelLane(front, tokenizer, board.serving(front.name), host)
            for front, tokenizer in models.items()
        )
        """A lane for each, found by name or alias."""
        metrics.watch(self.reading)
        self._tracing = open_tracing(config.otlp_endpoint)

    async def start(self) -> None:
        """Connect to the decode instances that are listed; those that come later follow."""
        await asyncio.gather(*(lane.start() for lane in self.models.lanes))

    async def drain(self, timeout_s: float) -> None:
        """Admit nothing more, and give what is open `timeout_s` seconds to end.

        What waits for its turn is refused: another gateway can still take it.
        """
        self._closing = True
        for lane in self.models.lanes:
            lane.shut()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self.idle()

    async def close(self, timeout_s: float = 5.0) -> None:
        """End every session, and with it every open request; wait until its consumer has left."""
        self._closing = True
        await self._tasks.drain(0)
        for lane in self.models.lanes:
            await lane.say_goodbye()
        await self.drain(timeout_s)
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.close)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    def model(self, caller: Caller, name: str | None = None) -> ServedModel:
        """Return what a caller's request for a model is checked against.

        Raises UnknownModel if there is none for the caller, Unavailable until a decode instance of
        it has come, InvalidRequest if none is named and there are several.
        """
        return self.models.of(caller, name).served(caller)

    def now(self) -> float:
        """Return the time on the gateway's clock."""
        return self._clock()

    def generate(self, request: TextRequest) -> AsyncGenerator[Piece, None]:
        """Yield a request's text as it becomes certain; the last piece has `finish` set.

        Close the generator (`contextlib.aclosing`) when the consumer goes away: the request is
        then cancelled on its decode instance at once. If that instance is lost or drains, the
        request goes on at its next token on another (see api/journey.py). Raises Overloaded,
        Unavailable, DeadlineExceeded, or what the decode instance tells.
        """
        return self.models.by_name(request.model).generate(self._traced(request))

    def cancel(self, request_id: str, caller: Caller) -> Ended:
        """End the open requests of that id, or of the call of that id; return how many there are.

        Whoever reads them gets Cancelled. Those of other tenants do not exist for the caller.
        """
        ended = [lane.cancel(request_id, caller) for lane in self.models.lanes]
        return Ended(sum(e.requests for e in ended), sum(e.waiting for e in ended))

    def _traced(self, request: TextRequest) -> TextRequest:
        """Return it with the span that the instances are to know: its own, or its caller's."""
        span = "" if request.arrival is None else request.arrival.traceparent
        if self._tracing is not None:
            span = self._tracing.begun(span)
        if not is_traceparent(span):  # the caller may have sent anything
            return request
        return replace(request, generate=replace(request.generate, traceparent=span))

    def _left(self) -> None:
        """Let those that wait for any model look again: their tenant may be free to start one."""
        for lane in self.models.lanes:
            lane.poke()

    def _ended(self, trace: RequestTrace) -> None:
        self._traces.add(trace)
        self._latency.add(trace)
        self.metrics.closed(trace)
        _log_end(trace)
        if self._tracing is not None:
            self._tracing.ended(trace, time.time_ns())

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
        found = (lane.explain(request_id) for lane in self.models.lanes)
        told = next((explanation for explanation in found if explanation is not None), None)
        return told if told is not None and caller.sees(told["tenant"]) else None

    def health(self) -> list[str]:
        """Return the reasons why requests cannot be served as they should; none: healthy."""
        reasons = ["the gateway is shutting down"] if self._closing else []
        several = len(self.models.lanes) > 1
        for lane in self.models.lanes:
            of = f"{lane.front.name}: " if several else ""
            reasons += [f"{of}{problem}" for problem in lane.problems()]
        return reasons

    @property
    def serves(self) -> bool:
        """Whether requests of any model can be served as they should."""
        return not self._closing and any(not lane.problems() for lane in self.models.lanes)

    async def idle(self) -> None:
        """Wait until no request is open."""
        for lane in self.models.lanes:
            await lane.idle()

    def check(self) -> None:
        """Assert that no request is open and that nothing is left of those that were.

        After `close` no task is left either.
        """
        for lane in self.models.lanes:
            lane.check()
        self._limits.check({}, {})
        assert not self._tasks.crashed, self._tasks.crashed
        if self._closing:
            self._tasks.check()

    def reading(self) -> GatewayReading:
        """Return what is so now, of what metrics do not count as it happens."""
        lanes = self.models.lanes
        return GatewayReading(
            waiting={lane.front.name: lane.waiting for lane in lanes},
            membership_version=self._board.current.version,
            instances=tuple(reading for lane in lanes for reading in lane.readings()),
        )

    def status(self, *, recent: int, sees: Callable[[RequestTrace], bool]) -> dict[str, Any]:
        """Return how everything is, for GET /v1/status; with requests that the caller may see."""
        lanes, stats = self.models.lanes, self.stats()
        routers = [lane.router for lane in stats.models.values()]
        view = StatusView(
            clock_s=self._clock(),
            uptime_s=max(0.0, time.time() - self.created),
            membership_version=self._board.current.version,
            models=tuple(
                ModelView(lane.front, lane.membership, lane.problems(), stats.models[name])
                for name, lane in ((lane.front.name, lane) for lane in lanes)
            ),
            last_minute=self._latency.summary(),
            reports={r.instance_id: r.report for lane in lanes for r in lane.readings()},
            problems=self.health(),
            usable={i.instance_id for lane in lanes for i in lane.usable().instances},
            totals={
                "open": stats.open_requests,
                "waiting": stats.waiting,
                "limit": sum(lane.max_open_requests for lane in lanes),
                "admitted": sum(router.admitted for router in routers),
                "refused": sum(router.overloaded + router.unavailable for router in routers),
                "prompt_tokens": stats.prompt_tokens,
                "output_tokens": stats.output_tokens,
            },
        )
        traces = (trace for trace in self._traces.latest() if sees(trace))
        return status_of(view, list(itertools.islice(traces, recent)))

    def stats(self) -> GatewayStats:
        """Return a snapshot."""
        models = {lane.front.name: lane.stats() for lane in self.models.lanes}
        each = models.values()
        return GatewayStats(
            open_requests=sum(stats.open_requests for stats in each),
            prompt_tokens=sum(stats.prompt_tokens for stats in each),
            output_tokens=sum(stats.output_tokens for stats in each),
            waiting=sum(stats.waiting for stats in each),
            queued=sum(stats.queued for stats in each),
            traces=len(self._traces),
            sessions=tuple(session for stats in each for session in stats.sessions),
            models=models,
        )

    def __repr__(self) -> str:
        return f"Gateway({', '.join(map(repr, self.models.lanes))})"


def _log_end(trace: RequestTrace) -> None:
    _log.info(
        "request ended",
        request=trace.request_id,
        model=trace.model,
        outcome=trace.error or trace.finish,
        decode=trace.decode_instance,
        prompt_tokens=trace.prompt_tokens,
        output_tokens=trace.output_tokens,
        ttft_s=trace.ttft_s,
        e2e_s=trace.e2e_s,
    )
