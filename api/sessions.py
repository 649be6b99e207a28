"""A session with every decode instance that the membership lists."""

import asyncio
import contextlib
from collections.abc import Callable

from baton.api.decode_session import DecodeSession, SessionStats
from baton.core.clock import Clock
from baton.core.config import ClusterTlsConfig
from baton.core.errors import InstanceLost
from baton.core.log import get_logger
from baton.core.topology import InstanceInfo, Membership, MembershipBoard, Role
from baton.router.load import InstanceKey, key_of

FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 2.0
"""Between two tries to open a session; it doubles from the first to the longest."""

_log = get_logger("gateway.sessions")


class Sessions:
    """Keeps one session per listed instance and incarnation, and opens lost ones again."""

    def __init__(
        self,
        board: MembershipBoard,
        *,
        takes_requests: Callable[[InstanceInfo], bool],
        connect_timeout_s: float,
        max_unsent: int,
        clock: Clock,
        tls: ClusterTlsConfig | None = None,
    ) -> None:
        """`takes_requests` says of a listed instance whether it is there, and to be used."""
        self._board = board
        self._takes_requests = takes_requests
        self._connect_timeout_s = connect_timeout_s
        self._max_unsent = max_unsent
        self._clock = clock
        self._tls = tls
        self._sessions: dict[InstanceKey, DecodeSession] = {}
        self._untried: set[InstanceKey] | None = None
        self.settled = asyncio.Event()
        """Every instance of the first membership has been tried."""
        self._changed = asyncio.Event()

    def usable(self) -> Membership:
        """Return the current membership without those that are lost, or are not connected."""
        membership = self._board.current
        instances = tuple(
            i
            for i in membership.instances
            if self._takes_requests(i) and (i.role is Role.PREFILL or self._is_ready(i))
        )
        return Membership(membership.version, instances)

    def _is_ready(self, instance: InstanceInfo) -> bool:
        session = self._sessions.get(key_of(instance))
        return session is not None and session.ready

    def session(self, instance: InstanceInfo) -> DecodeSession:
        """Return the session with an instance that `usable` listed."""
        return self._sessions[key_of(instance)]

    def lose(self, instance: InstanceInfo, error: InstanceLost) -> None:
        """Break off the session with an instance that is lost: its requests go on elsewhere."""
        session = self._sessions.get(key_of(instance))
        if session is not None:
            session.break_off(error)
        self.tell_change()

    async def changed(self) -> None:
        """Wait until the membership changes, or an instance is connected or answers again."""
        await self._changed.wait()

    def tell_change(self) -> None:
        """Let all who wait for a change look again."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def run(self) -> None:
        """Follow the membership until cancelled; every session ends with this."""
        async with asyncio.TaskGroup() as group:
            version = -1
            while True:
                membership = await self._board.newer_than(version)
                version = membership.version
                self._follow(membership, group)

    def _follow(self, membership: Membership, group: asyncio.TaskGroup) -> None:
        listed = {key_of(i): i for i in membership.of(Role.DECODE, Role.MIXED)}
        for key, session in self._sessions.items():
            if key not in listed:
                session.retire()
        new = [key for key in listed if key not in self._sessions]
        for key in new:
            self._sessions[key] = self._new(listed[key])
            group.create_task(self._keep(listed[key]))
        if self._untried is None:
            self._untried = set(new)
            if not new:
                self.settled.set()
        self.tell_change()

    def _new(self, instance: InstanceInfo) -> DecodeSession:
        return DecodeSession(
            instance, clock=self._clock, max_unsent=self._max_unsent, tls=self._tls
        )

    async def _keep(self, instance: InstanceInfo) -> None:
        """Hold a session with `instance`, one after the other, for as long as it is listed."""
        key = key_of(instance)
        pause = FIRST_PAUSE_S
        while True:
            opened = asyncio.Event()

            def on_ready(opened: asyncio.Event = opened) -> None:
                opened.set()
                self._settle(key)
                self.tell_change()

            error = await self._sessions[key].run(
                connect_timeout_s=self._connect_timeout_s, on_ready=on_ready
            )
            self._settle(key)
            pause = FIRST_PAUSE_S if opened.is_set() else min(pause * 2, LONGEST_PAUSE_S)
            if await self._unlisted_within(key, pause):
                del self._sessions[key]
                return
            _log.warning("session lost", instance=instance.instance_id, reason=error.message)
            self._sessions[key] = self._new(instance)

    async def _unlisted_within(self, key: InstanceKey, seconds: float) -> bool:
        """Wait until the instance is no longer listed, at most `seconds`; return whether so."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._is_listed(key):
                    await self._board.newer_than(self._board.current.version)
        return not self._is_listed(key)

    def _is_listed(self, key: InstanceKey) -> bool:
        return any(key_of(i) == key for i in self._board.current.of(Role.DECODE, Role.MIXED))

    def _settle(self, key: InstanceKey) -> None:
        if self._untried is not None:
            self._untried -= {key}
            if not self._untried:
                self.settled.set()

    def stats(self) -> tuple[SessionStats, ...]:
        """Return a snapshot of every session."""
        return tuple(session.stats() for session in self._sessions.values())
