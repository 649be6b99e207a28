"""One model's way through a gateway, to its instances; each other model has a way of its own.

    Gateway ──by name──▶ ModelLane ── waiting room ▶ router ▶ sessions ▶ its own instances

What a lane holds is of its instances alone: their leases, loads, caches and costs, the queue for
them, and the requests that are open there. So requests of one model never wait for room, or for a
place in a queue, that another has taken; tenants have one budget for all of them (LaneHost.limits).
"""

import asyncio
import contextlib
import secrets
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from random import Random
from typing import Any

from baton.api.decode_session import SessionStats
from baton.api.event_follower import EventFollower
from baton.api.journey import Journey, JourneyHost
from baton.api.latency import RecentLatency
from baton.api.lease_keeper import LeaseKeeper, Terms
from baton.api.open_request import OpenRequest
from baton.api.peers import Ended
from baton.api.planner import Planner
from baton.api.request_names import is_named
from baton.api.sessions import Sessions
from baton.api.text_stream import Piece, TextStream
from baton.api.validate import ServedModel, TextRequest, tool_format
from baton.api.waiting_room import Place, WaitingRoom
from baton.core import log
from baton.core.clock import Clock
from baton.core.config import ClusterTlsConfig, GatewayConfig
from baton.core.errors import BatonError, InstanceLost, Overloaded, Unavailable
from baton.core.metrics import GatewayMetrics, InstanceReading
from baton.core.served_model import FrontModel
from baton.core.tasks import TaskSet
from baton.core.tenants import Caller, Tenant
from baton.core.topology import InstanceInfo, Membership, MembershipBoard, Role
from baton.core.trace import RequestTrace
from baton.models.tokenizer import Tokenizer
from baton.router.admission import Admission, Want
from baton.router.admission_room import RoomLimits
from baton.router.limits import TenantLimits
from baton.router.router import Router, RouterStats
from baton.router.state import RouterState

_RETRY_S = 5.0
"""For whoever finds too many waiting for an instance to start."""


@dataclass(frozen=True, slots=True)
class LaneHost:
    """What all lanes of one gateway share."""

    config: GatewayConfig
    metrics: GatewayMetrics
    limits: TenantLimits
    tenant: Callable[[str], Tenant]
    """Finds a tenant with the limits that hold now."""
    tasks: TaskSet
    clock: Clock
    index_blocks: int
    """KV blocks, of one lane's instances, of which it is known who has them."""
    on_left: Callable[[], None]
    """Hears of each request that gives its turn back: its tenant may start another, anywhere."""
    on_ended: Callable[[RequestTrace], None]
    """Hears of each request that is over."""
    beside_others: bool = False
    """Other gateways send requests to the same instances."""
    tls: ClusterTlsConfig | None = None
    """For the way to instances."""
    name: str = ""
    """What other gateways call this one; "": there are no others."""


@dataclass(frozen=True, slots=True)
class LaneStats:
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
    queue_s: float
    """How long the first of them has waited, beside those that wait for their tenant's limits."""
    queue_for: Role | None
    """Whose pool has no room for it; None: the gateway itself has as many open as it may."""
    ttft_s: float | None
    """90th percentile, over the requests of the last minute."""
    tpot_s: float | None
    """Likewise."""
    router: RouterStats
    sessions: tuple[SessionStats, ...]


class ModelLane:
    """One per model of a gateway; on its event loop."""

    def __init__(
        self, front: FrontModel, tokenizer: Tokenizer, board: MembershipBoard, host: LaneHost
    ) -> None:
        """`board` lists the instances of this model alone."""
        self.front = front
        self.tokenizer = tokenizer
        self._board = board
        self._host = host
        host.metrics.expect(front.name)
        self._tool_format = tool_format(front.tool_parser or host.config.tool_parser, tokenizer)
        state = RouterState(host.index_blocks)
        self._room = self._new_room()
        self._follower = EventFollower(board, state, on_told=self._room.poke, tls=host.tls)
        self._router = self._new_router(state)
        self._leases = self._new_leases()
        self._sessions = self._new_sessions()
        self._journeys = JourneyHost(self._sessions, host.config, host.tasks, host.clock)
        self._latency = RecentLatency(host.clock)
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

    # ---- its parts --------------------------------------------------------------------------

    @property
    def max_open_requests(self) -> int:
        """How many of its requests may be at instances at once."""
        return self.front.limits.max_open_requests or self._host.config.max_open_requests

    def _new_room(self) -> WaitingRoom:
        config, clock = self._host.config, self._host.clock
        admission = Admission(
            max_queued=config.max_queued_requests,
            queue_timeout_s=config.queue_timeout_s,
            limits=self._host.limits,
            clock=clock,
        )
        return WaitingRoom(
            admission,
            model=self.front.name,
            is_served=self._has_decode,
            on_left=self._host.on_left,
            metrics=self._host.metrics,
            clock=clock,
        )

    def _new_router(self, state: RouterState) -> Router:
        beside_others = self._host.beside_others
        return Router(
            max_open_requests=self.max_open_requests,
            clock=self._host.clock,
            state=state,
            salt=secrets.token_hex(8) if beside_others else "",
            rng=Random() if beside_others else None,
            decisions_kept=self._host.config.traces_kept,
            on_room=self._room.poke,
        )

    def _new_leases(self) -> LeaseKeeper:
        lease_s = self._host.config.lease_s
        return LeaseKeeper(
            self._board,
            Terms(f"gateway/{secrets.token_hex(8)}", lease_s=lease_s, beat_s=lease_s / 3),
            on_lost=self._lost,
            on_live=self._live,
            clock=self._host.clock,
            tls=self._host.tls,
        )

    def _new_sessions(self) -> Sessions:
        return Sessions(
            self._board,
            takes_requests=self._leases.takes_requests,
            connect_timeout_s=self._host.config.connect_timeout_s,
            max_unsent=2 * self.max_open_requests,
            clock=self._host.clock,
            tls=self._host.tls,
        )

    # ---- from start to end ------------------------------------------------------------------

    async def start(self) -> None:
        """Connect to the decode instances that are listed; those that come later follow."""
        tasks = self._host.tasks
        for work in (self._leases, self._sessions, self._follower):
            tasks.start(work.run())
        tasks.start(self._look_at_changes())
        await self._sessions.settled.wait()

    def shut(self) -> None:
        """Admit nothing more; what waits for its turn is refused."""
        self._closing = True
        self._room.close()
        self._sessions.tell_change()

    async def say_goodbye(self) -> None:
        """Give the leases back, once nothing runs any more."""
        await self._leases.close()

    async def idle(self) -> None:
        """Wait until no request is open."""
        await self._idle.wait()

    def poke(self) -> None:
        """Let those that wait look again: somebody may start."""
        self._room.poke()

    async def _look_at_changes(self) -> None:
        """Let those that wait look again whenever an instance comes, goes or is connected."""
        while True:
            await self._sessions.changed()
            self._room.poke()

    def _lost(self, instance: InstanceInfo, error: InstanceLost) -> None:
        self._sessions.lose(instance, error)

    def _live(self, instance: InstanceInfo) -> None:
        self._sessions.tell_change()  # its session may have been ready before

    # ---- what is served ---------------------------------------------------------------------

    def served(self, caller: Caller) -> ServedModel:
        """Return what a caller's request is checked against.

        Raises Unavailable until a decode instance has come.
        """
        decode = self._board.current.of(Role.DECODE, Role.MIXED)
        if decode:
            self._max_model_len = max(i.max_model_len for i in decode)
        if not self._max_model_len:
            raise Unavailable(
                f"no decode instance has been ready yet for model {self.front.name!r}"
            )
        return ServedModel(
            self.front.name,
            self.tokenizer,
            self._max_model_len,
            self._tool_format,
            caller.tenant,
            self._host.name,
            self.front.aliases,
            self.front.limits,
        )

    async def some_decode(self) -> None:
        """Wait for a decode instance if there is none because there was nothing to do.

        Returns after `migration_wait_s` in any case: whoever needs one tells then that there is
        none. Raises Overloaded if too many wait already.
        """
        if not self.front.may_be_empty or self._has_decode():
            return
        if self._waiting + len(self._open) >= self.max_open_requests:
            text = f"{self._waiting} requests wait for a decode instance for {self.front.name!r}"
            raise Overloaded(text, _RETRY_S)
        self._waiting += 1
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._host.config.migration_wait_s):
                    while not (self._closing or self._has_decode()):
                        await self._sessions.changed()
        finally:
            self._waiting -= 1

    def _has_decode(self) -> bool:
        return bool(self._sessions.usable().of(Role.DECODE, Role.MIXED))

    # ---- requests ---------------------------------------------------------------------------

    async def generate(self, request: TextRequest) -> AsyncGenerator[Piece, None]:
        """Yield a request's text as it becomes certain; see Gateway.generate."""
        log.tag_request(request.generate.request_id, request.generate.traceparent)
        try:
            await self.some_decode()
            opened = await self._admit(request)
        except BatonError as error:
            self._host.metrics.refused(error.code, self.front.name)
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

    def cancel(self, request_id: str, caller: Caller) -> Ended:
        """End the requests of that id that exist for the caller; see Gateway.cancel."""

        def wanted(own: str, tenant: str) -> bool:
            return is_named(own, request_id) and caller.sees(tenant)

        requests = ((opened, opened.request.generate) for opened in self._open)
        found = [opened for opened, r in requests if wanted(r.request_id, r.tenant)]
        waiting = self._room.cancel(wanted)
        return Ended(sum(opened.cancel() for opened in found) + waiting, waiting)

    async def _admit(self, request: TextRequest) -> OpenRequest:
        if self._closing:
            raise Unavailable("the gateway is shutting down")
        generate, clock = request.generate, self._host.clock
        text = TextStream(
            request.detokenizer(self.tokenizer),
            stop=request.stop,
            stop_token_ids=generate.stop_token_ids,
            min_tokens=generate.sampling.min_tokens,
        )
        came, timeout_s = clock(), self._timeout_s(request)
        place = await self._enter(request, came + timeout_s)
        waited_s = clock() - came
        opened = OpenRequest(  # nothing may fail from here on: somebody must give the place back
            request,
            place.lease,
            text,
            model=self.front.name,
            clock=clock,
            timeout_s=timeout_s,
            waited_s=waited_s,
            on_over=self._over,
        )
        self._open[opened] = place
        self._idle.clear()
        self._prompt_tokens += len(generate.prompt)
        self._host.metrics.opened(self.front.name, len(generate.prompt), waited_s)
        return opened

    def _timeout_s(self, request: TextRequest) -> float:
        most = self._host.config.request_timeout_s
        return most if request.timeout_s is None else min(most, request.timeout_s)

    async def _enter(self, request: TextRequest, deadline: float) -> Place:
        generate = request.generate
        want = Want(
            tenant=self._host.tenant(generate.tenant),
            prompt_tokens=len(generate.prompt),
            max_tokens=generate.max_tokens,
            deadline=deadline,
            priority=generate.priority,
        )
        config = self._host.config
        limits = RoomLimits(config.decode_fill, config.prefill_ahead_s)
        usable, slo_s = self._sessions.usable, want.tenant.tpot_slo_s
        planner = Planner(self._router, usable, limits, request, slo_s)
        return await self._room.enter(want, planner)

    def _over(self, opened: OpenRequest, trace: RequestTrace) -> None:
        place = self._open.pop(opened)
        self._room.left(place.turn, opened.received)
        self._output_tokens += opened.received
        self._latency.add(trace)
        self._router.ended(trace)
        self._host.on_ended(trace)
        if not self._open:
            self._idle.set()

    # ---- how it is --------------------------------------------------------------------------

    def explain(self, request_id: str) -> dict[str, Any] | None:
        """Return why a request went where it did, ready for JSON; None if that is not known."""
        return self._router.explain(request_id)

    def problems(self) -> list[str]:
        """Return the reasons why its requests cannot be served as they should."""
        usable, reasons = self._sessions.usable(), []
        if not (self.front.may_be_empty or usable.of(Role.DECODE, Role.MIXED)):
            reasons.append("no decode instance is ready")
        if self.front.expects_prefill and not usable.of(Role.PREFILL):
            reasons.append("no prefill instance is ready")
        return reasons

    @property
    def membership(self) -> Membership:
        """Its instances, as they were listed last."""
        return self._board.current

    def usable(self) -> Membership:
        """Return its instances to which new requests may go."""
        return self._sessions.usable()

    def readings(self) -> tuple[InstanceReading, ...]:
        """Return what each of its instances said last."""
        return tuple(
            InstanceReading(i.instance_id, i.role, i.model, self._leases.report(i))
            for i in self._board.current.instances
        )

    @property
    def waiting(self) -> int:
        """Requests that can go on only once there is a decode instance."""
        return self._waiting + (0 if self._has_decode() else len(self._open))

    def stats(self) -> LaneStats:
        """Return a snapshot."""
        return LaneStats(
            open_requests=len(self._open),
            prompt_tokens=self._prompt_tokens,
            output_tokens=self._output_tokens + sum(o.received for o in self._open),
            waiting=self.waiting,
            queued=len(self._room),
            queue_s=self._room.waited_s(),
            queue_for=self._router.lacking,
            ttft_s=self._latency.ttft_s(),
            tpot_s=self._latency.tpot_s(),
            router=self._router.stats(),
            sessions=self._sessions.stats(),
        )

    def check(self) -> None:
        """Assert that no request is open and that nothing is left of those that were."""
        assert not self._open, self._open
        self._room.check()
        self._router.check()
        router = self._router.stats()
        assert router.open_requests == 0, router
        assert not any(s.open_requests for s in self._sessions.stats()), self._sessions.stats()

    def __repr__(self) -> str:
        return f"ModelLane({self.front.name}, open={len(self._open)})"
