"""Requests that wait at the gateway until the instances have room, or until it makes no sense."""

import asyncio
from collections.abc import Callable
from contextvars import Context, copy_context
from dataclasses import dataclass

from baton.api.planner import Planner
from baton.core.clock import Clock
from baton.core.errors import BatonError, Cancelled, InternalError, Overloaded, Unavailable
from baton.core.log import get_logger
from baton.core.metrics import GatewayMetrics
from baton.router.admission import Admission, Want
from baton.router.admission_room import Outlook
from baton.router.fair_queue import Turn
from baton.router.router import Lease

_log = get_logger("gateway.waiting")


@dataclass(frozen=True, slots=True)
class Place:
    """A request that was let in; `WaitingRoom.left` gives its turn back."""

    turn: Turn
    lease: Lease


@dataclass(frozen=True, slots=True)
class _Guest:
    planner: Planner
    context: Context
    """Its own: what is logged while somebody else's task lets it in is about this request."""
    place: "asyncio.Future[Place]"


class WaitingRoom:
    """The tasks' side of router/admission.py; on one event loop."""

    def __init__(
        self,
        admission: Admission,
        *,
        model: str,
        is_served: Callable[[], bool],
        on_left: Callable[[], None],
        metrics: GatewayMetrics,
        clock: Clock,
    ) -> None:
        """`is_served` says whether there is a decode instance of the model at all.

        Without one all wait. `on_left` is called when a turn is given back, and pokes this room.
        """
        self._admission = admission
        self._model = model
        self._on_left = on_left
        self._is_served = is_served
        self._metrics = metrics
        self._clock = clock
        self._guests: dict[Turn, _Guest] = {}
        """Those that wait, or have not heard yet that they need not."""
        self._poked = False
        self._closed = False

    def __len__(self) -> int:
        """Return how many wait."""
        return len(self._admission)

    def waited_s(self) -> float:
        """Return for how long the first of those has waited that instances have no room for."""
        return self._admission.waited_s()

    def __repr__(self) -> str:
        return f"WaitingRoom({self._admission!r})"

    async def enter(self, want: Want, planner: Planner) -> Place:
        """Wait for this request's turn, for as long as it may.

        Raises Overloaded, with the reason and when to come back, and Unavailable if there is no
        instance or the room closes. Whoever is cancelled here leaves nothing behind.
        """
        try:
            turn = self._arrive(want, planner)
            return await self._called(turn)
        except Overloaded as error:
            self._metrics.turned_away(error.reason, self._model)
            raise

    def _arrive(self, want: Want, planner: Planner) -> Turn:
        if self._closed:
            raise Unavailable("the gateway is shutting down")
        outlook = self._outlook(want, planner)
        turn = self._admission.arrive(want, planner.expected_output(), outlook)
        place: asyncio.Future[Place] = asyncio.get_running_loop().create_future()
        self._guests[turn] = _Guest(planner, copy_context(), place)
        self._pump()
        return turn

    def _outlook(self, want: Want, planner: Planner) -> Outlook | None:
        """Return how a request would fare once it starts; only of one that will have to wait."""
        if not self._is_served():
            text = f"no decode instance is ready for model {self._model!r}"
            raise Unavailable(text)
        if self._admission.next() is None:
            return None
        plan = planner.plan(with_room=False)
        return None if plan is None else plan.outlook

    async def _called(self, turn: Turn) -> Place:
        place = self._guests[turn].place
        left_s = max(0.0, self._admission.gives_up_at(turn) - self._clock())
        try:
            if place.done():
                return place.result()
            async with asyncio.timeout(left_s):
                return await place
        except BaseException as error:
            refused = self._admission.gave_up(turn) if isinstance(error, TimeoutError) else None
            self._give_up(turn, place)
            if refused is not None:
                raise refused from None
            raise
        finally:
            del self._guests[turn]

    def _give_up(self, turn: Turn, place: "asyncio.Future[Place]") -> None:
        if place.done() and not place.cancelled() and place.exception() is None:
            place.result().lease.close()  # its turn came just when it went
        self.left(turn)

    def left(self, turn: Turn, output_tokens: int = 0) -> None:
        """Take a turn back: its request is over."""
        self._admission.left(turn, output_tokens)
        self._on_left()

    # ---- whose turn it is -------------------------------------------------------------------

    def poke(self) -> None:
        """Look soon whether somebody can start: there may be room."""
        if not self._poked and len(self._admission):
            self._poked = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        """Start all who can start, in turn; who is too many has to go."""
        self._poked = False
        while self._is_served() and (turn := self._admission.next()) is not None:
            try:
                if not self._guests[turn].context.run(self._start, turn):
                    break
            except BatonError as error:
                self._refuse(turn, error)
            except Exception as bug:
                _log.exception("bug while a request was let in")
                self._refuse(turn, InternalError(f"not let in: {bug!r}"))
        while (turn := self._admission.settle()) is not None:
            self._refuse(turn, self._admission.crowded_out(turn))
        self._metrics.queued(len(self._admission), self._model)

    def _start(self, turn: Turn) -> bool:
        """Start whose turn it is; False: there is no room."""
        guest = self._guests[turn]
        if guest.place.done():  # it was cancelled just now
            self._admission.withdraw(turn)
            return True
        plan = guest.planner.plan(with_room=True)
        if plan is None:
            return False
        self._admission.check_start(turn, plan.outlook)
        lease = guest.planner.open(plan)
        self._admission.start(turn)
        guest.place.set_result(Place(turn, lease))
        return True

    def _refuse(self, turn: Turn, error: BatonError) -> None:
        """Send a guest away; it gives its turn back itself."""
        self._admission.withdraw(turn)
        place = self._guests[turn].place
        if not place.done():
            place.set_exception(error)

    def cancel(self, wanted: Callable[[str, str], bool]) -> int:
        """Send away those who wait and are `wanted`; return how many there are.

        `wanted` is asked with request id and tenant. Their requests end with Cancelled.
        """
        found = [
            turn
            for turn, guest in self._guests.items()
            if not guest.place.done()
            and wanted(guest.planner.request_id, self._admission.want(turn).tenant.name)
        ]
        for turn in found:
            self._refuse(turn, Cancelled("the caller asked for it while it waited for its turn"))
        self._metrics.queued(len(self._admission), self._model)
        return len(found)

    def close(self) -> None:
        """Send all who wait away, and let nobody in any more."""
        self._closed = True
        for turn in [t for t, guest in self._guests.items() if not guest.place.done()]:
            self._refuse(turn, Unavailable("the gateway is shutting down"))
        self._metrics.queued(len(self._admission), self._model)

    def check(self) -> None:
        """Assert that nobody is here, and that the books agree."""
        assert not self._guests, self._guests
        self._admission.check()
        assert not len(self._admission)
