"""One request's way over the decode instances: when one is gone, it goes on at the next token.

    submit ──▶ serving ──natural end, error──▶ over
                ▲   └─ instance lost, draining ─▶ looking for another ──nobody in time──▶ over
                └──────────── submit prompt + output ──┘

Whoever reads the tokens notices nothing: they go on in the same text stream, and since noise is a
function of (seed, position), they are the tokens that the lost instance would have sent.
"""

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from baton.api.decode_session import DecodeSession, Ended
from baton.api.open_request import OpenRequest
from baton.api.sessions import Sessions
from baton.core.clock import Clock
from baton.core.config import GatewayConfig
from baton.core.errors import (
    BatonError,
    Cancelled,
    InstanceLost,
    InternalError,
    Overloaded,
    Unavailable,
)
from baton.core.log import get_logger
from baton.core.request import FinishReason, TokenLogprobs
from baton.core.spans import DecodeSpans
from baton.core.tasks import TaskSet
from baton.core.trace import HandoverTrace, MigrationTrace
from baton.router.load import key_of
from baton.router.migration import Migrations

_log = get_logger("gateway.journey")


@dataclass(frozen=True, slots=True)
class JourneyHost:
    """What all journeys of one gateway share."""

    sessions: Sessions
    config: GatewayConfig
    tasks: TaskSet
    clock: Clock


class Journey:
    """Hears what the session with its decode instance says, and tells the open request.

    Ends the request exactly once, whatever happens.
    """

    def __init__(self, opened: OpenRequest, host: JourneyHost) -> None:
        self._opened = opened
        self._host = host
        self._migrations = Migrations(
            limit=host.config.max_migrations, wait_s=host.config.migration_wait_s
        )
        self._session: DecodeSession | None = None
        """The one that serves it, or did so last."""
        self._key = 0
        self._backed_up = 0
        """Tokens, from the first, that the backup instance of the route has."""
        self._looking: asyncio.Task[None] | None = None
        self._handovers: tuple[HandoverTrace, ...] = ()
        self._local_prefill = False
        self._over = False

    def __repr__(self) -> str:
        return f"Journey({self._opened!r}, {self._migrations!r})"

    # Commands

    def start(self) -> None:
        """Send the request to the decode instance of its route."""
        self._submit()

    def cancel(self) -> None:
        """End the request: its consumer has left."""
        if self._looking is not None:
            self._looking.cancel()
            self._end(Ended(FinishReason.CANCELLED, Cancelled("the caller asked for it")))
        elif self._session is not None:
            self._session.cancel(self._key)

    # What the session says: see Listener

    def deliver(
        self, tokens: Sequence[int], at: float, logprobs: Sequence[TokenLogprobs] = ()
    ) -> None:
        """Take the tokens of one engine step."""
        self._migrations.went_on()
        self._opened.deliver(tokens, at, logprobs)

    def cached(self, prompt_tokens: int) -> None:
        """Take how many tokens a prefix cache had of what was to be computed."""
        self._opened.cached(prompt_tokens)

    def first_token(self, spans: DecodeSpans) -> None:
        """Take where the time to the first token went, as the decode instance says."""
        self._opened.first_token(spans)

    def backed_up(self, tokens: int) -> None:
        """Take how many tokens the backup instance has: it goes on with the request, if need be."""
        self._backed_up = tokens

    def ended(self, ended: Ended) -> None:
        """Pass the end on, or look for another instance that goes on with the request."""
        lease = self._opened.lease
        lease.handed_over(ended.handovers)
        self._handovers += ended.handovers
        self._local_prefill |= ended.local_prefill
        if ended.error is None or self._opened.given_up:
            self._end(ended)
            return
        now = self._host.clock()
        error = self._migrations.ended(key_of(lease.route.decode), ended.error, now)
        if error is not None:
            self._end(replace(ended, error=error))
        elif (finish := self._opened.natural_finish()) is not None:
            self._end(Ended(finish))
        else:
            self._look(ended.error, now)

    # How

    def _submit(self) -> None:
        """Hand what is left to the session; if that raises, which is a bug, it ends with an error.

        The session may end the request before this returns.
        """
        route, opened = self._opened.lease.route, self._opened
        try:
            self._session = self._host.sessions.session(route.decode)
            opened.sent()
            self._key = self._session.submit(
                opened.remaining(),
                route.prefill,
                timeout_s=opened.seconds_left(),
                listener=self,
                backup=route.backup,
            )
        except Exception as bug:
            _log.exception(
                "bug while a request was submitted",
                request=opened.request.generate.request_id,
                opened=repr(opened),
            )
            error = InternalError(f"not submitted: {bug!r}")
            self._end(Ended(FinishReason.ERROR, error))

    def _look(self, error: BatonError, lost_at: float) -> None:
        """Look for another instance, in a task."""
        task = self._looking = self._host.tasks.start(self._go_on(error, lost_at))
        task.add_done_callback(self._looked)

    def _looked(self, task: "asyncio.Task[None]") -> None:
        if task.cancelled():  # perhaps before it ran at all
            error: BatonError = Unavailable("the gateway is shutting down")
        elif bug := task.exception():
            error = InternalError(f"not resumed: {bug!r}")
        else:
            return
        self._end(Ended(FinishReason.ERROR, error))

    async def _go_on(self, error: BatonError, lost_at: float) -> None:
        opened, until = self._opened, self._migrations.until
        assert until is not None, "looking, and not lost"
        gone = opened.lease.route.decode.instance_id
        try:
            async with asyncio.timeout(until - lost_at):
                await self._find(error)
        except TimeoutError:
            limit = f"{self._host.config.migration_wait_s:g} s"
            text = f"no decode instance took over within {limit}; it ended with: {error.message}"
            self._end(Ended(FinishReason.ERROR, InstanceLost(text)))
            return
        wait_s = self._host.clock() - lost_at
        backed_up, self._backed_up = self._backed_up, 0
        opened.moved(MigrationTrace(gone, error.code, opened.received, wait_s, backed_up))
        _log.warning(
            "request resumed",
            request=opened.request.generate.request_id,
            lost=gone,
            code=error.code,
            goes_on=opened.lease.route.decode.instance_id,
            output_tokens=opened.received,
            backed_up_tokens=backed_up,
            wait_s=wait_s,
        )
        self._looking = None
        self._submit()

    async def _find(self, error: BatonError) -> None:
        """Move the lease to another pair; waits until there is one."""
        sessions, lease = self._host.sessions, self._opened.lease
        backup = lease.route.backup if self._backed_up else None
        preferred = None if backup is None else key_of(backup)
        if isinstance(error, Overloaded):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(error.retry_after_s):
                    await sessions.changed()
        while True:
            try:
                lease.move(sessions.usable(), avoided=self._migrations.avoided, preferred=preferred)
            except Unavailable:
                await sessions.changed()
            else:
                return

    def _end(self, ended: Ended) -> None:
        if not self._over:
            self._over = True
            whole = replace(ended, handovers=self._handovers, local_prefill=self._local_prefill)
            self._opened.ended(whole)
