"""A gateway of its own: front door and routers for its models, fed by the controller.

It goes on with the last membership while there is no controller.
"""

import asyncio
import contextlib
import os
import traceback
from collections.abc import Callable
from typing import Any

from baton.api.gateway import Gateway
from baton.api.model_lane import LaneStats
from baton.api.peers import ALONE, Peers
from baton.api.serve import FrontDoor
from baton.cluster import ray_calls
from baton.cluster.membership_feed import follow
from baton.cluster.names import CONTROLLER
from baton.cluster.status import GatewayInfo, GatewayPlan, ModelLoad
from baton.core.control_reading import ControlReading
from baton.core.errors import BatonError, InternalError
from baton.core.metrics import GatewayMetrics
from baton.core.tenants import Caller
from baton.core.topology import Membership, MembershipBoard
from baton.models.tokenizer import load_tokenizer

POLL_S = 10.0
"""How long one question for the membership waits for news."""
_POLL_MARGIN_S = 5.0
_TRY_AGAIN_S = 2.0
_READ_EVERY_S = 5.0
"""What the controller counts."""


class GatewayHost:
    """Serves from `serve` to `stop`. One event loop only."""

    def __init__(
        self, plan: GatewayPlan, on_tried: Callable[[], None], peers: Peers = ALONE
    ) -> None:
        """`on_tried` is called when it listens, or is kept from it."""
        self._plan = plan
        self._peers = peers
        self._on_tried = on_tried
        self.door: FrontDoor | None = None
        """Once it listens."""
        self._problem: BatonError | None = None
        self._board = MembershipBoard(Membership(-1))
        self._control: ControlReading | None = None
        """What the controller told last; None while it does not answer."""
        self._stop = asyncio.Event()
        self._drain_s = 0.0

    async def serve(self) -> None:
        """Serve until told to stop; what is in the way, such as a port in use, may go away.

        A bug ends it, also one in what follows the membership: see or_exit.
        """
        async with asyncio.TaskGroup() as group:
            feed = group.create_task(follow(self._board, _ask))
            while not self._stop.is_set():
                try:
                    await self._serve_once()
                except BatonError as error:
                    traceback.print_exc()
                    self._problem = error
                    self._on_tried()
                    await _set_within(self._stop, _TRY_AGAIN_S)
            feed.cancel()

    async def _read_control(self) -> None:
        """Ask again and again for what the controller counts, until cancelled."""
        while True:
            try:
                self._control = await _asked("reading", timeout_s=_READ_EVERY_S)
            except BatonError:
                self._control = None
            await asyncio.sleep(_READ_EVERY_S)

    async def _serve_once(self) -> None:
        plan, metrics = self._plan, GatewayMetrics()
        metrics.watch_control(lambda: self._control)
        folders = plan.models.values()
        loading = (asyncio.to_thread(load_tokenizer, folder) for folder in folders)
        tokenizers = await asyncio.gather(*loading)
        gateway = Gateway(
            plan.config,
            dict(zip(plan.models, tokenizers, strict=True)),
            self._board,
            metrics,
            beside_others=True,
            tls=plan.tls,
            peers=self._peers,
        )
        async with gateway:
            self.door = await FrontDoor.start(gateway)
            self._problem = None
            self._on_tried()
            async with asyncio.TaskGroup() as group:
                reader = group.create_task(self._read_control())
                await self._stop.wait()
                reader.cancel()
            await self.door.close(self._drain_s)

    async def stop(self, drain_s: float) -> None:
        """Begin to close: no new requests, and `drain_s` seconds for those that are open."""
        self._drain_s = drain_s
        self._stop.set()

    async def answer(self, question: str, request_id: str, caller: Caller) -> Any:
        """Answer another gateway by what this one has itself: nothing is passed on twice.

        `question` is a method of Peers, and so is the answer; None if nobody listens here now.
        """
        if self.door is None:
            return None
        gateway = self.door.gateway
        match question:
            case "cancel":
                return gateway.cancel(request_id, caller)
            case "explain":
                return gateway.explain(request_id, caller)
            case "trace":
                return gateway.trace(request_id, caller)
        raise InternalError(f"no question of a gateway's: {question!r}")

    async def info(self) -> GatewayInfo:
        """Return where it listens; raises what kept it from doing so."""
        if self._problem is not None:
            raise self._problem
        assert self.door is not None, "neither door nor problem"
        models = self.door.gateway.stats().models
        return GatewayInfo(
            name=self._plan.name,
            http_url=self.door.http_url,
            grpc_address=self.door.grpc_address,
            pid=os.getpid(),
            epoch=self._board.current.version,
            models={name: _load(stats) for name, stats in models.items()},
        )


def _load(stats: LaneStats) -> ModelLoad:
    return ModelLoad(
        open_requests=stats.open_requests,
        waiting=stats.waiting,
        queue_s=stats.queue_s,
        queue_for=stats.queue_for,
        ttft_s=stats.ttft_s,
        tpot_s=stats.tpot_s,
    )


async def _set_within(event: asyncio.Event, timeout_s: float) -> None:
    """Wait for an event, at most so long."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await event.wait()


async def _ask(version: int) -> Membership:
    """Ask the controller for a later membership; see membership_feed.Ask."""
    found: Membership = await _asked(
        "membership", version, POLL_S, timeout_s=POLL_S + _POLL_MARGIN_S
    )
    return found


async def _asked(method: str, *arguments: Any, timeout_s: float) -> Any:
    controller = await ray_calls.find_actor(CONTROLLER, _POLL_MARGIN_S)
    return await ray_calls.call(controller, "ask", method, *arguments, timeout_s=timeout_s)
