"""Whether an instance is still there, as far as this process can judge that.

To a controller that is cut off, those that it cannot reach seem lost. They are well, and there may
be another controller by then: it must not touch them.
"""

import asyncio
from collections.abc import Awaitable, Callable

from baton.api.lease_keeper import LeaseKeeper, Terms
from baton.cluster.instance import Instance
from baton.core.config import ClusterTlsConfig
from baton.core.errors import BatonError, InstanceLost
from baton.core.ids import InstanceId
from baton.core.lease import Report
from baton.core.topology import InstanceInfo, MembershipBoard

_PAUSE_S = 1.0
_ANSWER_TRIES = 4
"""Once Ray's head answers again, for each instance to do so too."""


async def always() -> bool:
    """Say that nobody can be cut off from himself."""
    return True


class Watch:
    """Waits for the ends of instances; one event loop only."""

    def __init__(
        self,
        board: MembershipBoard,
        terms: Terms | None,
        rules: Callable[[], Awaitable[bool]],
        tls: ClusterTlsConfig | None = None,
    ) -> None:
        """`terms`: on which members hold a lease of this process; None: they hold none.

        `rules` asks whether this process is to be believed: False if it may be cut off. `tls` is
        for the leases.
        """
        self._board = board
        self._rules = rules
        self._leases: LeaseKeeper | None = None
        if terms is not None:
            self._leases = LeaseKeeper(board, terms, on_lost=self._gave_up, tls=tls)
        self._watched: dict[InstanceId, tuple[InstanceInfo, Instance]] = {}
        self._unreachable: set[InstanceId] = set()

    def __repr__(self) -> str:
        return f"Watch({', '.join(self._watched)})"

    async def run(self) -> None:
        """Renew the leases, if there are any, while this process rules, until cancelled."""
        if self._leases is None:
            return
        async with asyncio.TaskGroup() as group:
            group.create_task(self._leases.run())
            group.create_task(self._pause_unless_ruling(self._leases))

    async def ended(self, info: InstanceInfo, instance: Instance) -> None:
        """Wait until an instance ends, hangs, or cannot be reached; raises InstanceLost then.

        Unavailable if Ray fails to say.
        """
        name = info.instance_id
        self._watched[name] = (info, instance)
        try:
            while True:
                self._unreachable.discard(name)
                await self._lost_once(info, instance)
        finally:
            del self._watched[name]

    def reports(self) -> dict[InstanceId, Report]:
        """Return what each live member said last, of those that have."""
        if self._leases is None:
            return {}
        told = {i.instance_id: self._leases.report(i) for i in self._board.current.instances}
        return {name: report for name, report in told.items() if report is not None}

    @property
    def lease_flaps(self) -> int:
        """See LeaseKeeper.flaps."""
        return 0 if self._leases is None else self._leases.flaps

    def was_unreachable(self, name: InstanceId) -> bool:
        """Return whether nobody answered where it was: then it may be its node."""
        return name in self._unreachable

    async def _pause_unless_ruling(self, leases: LeaseKeeper) -> None:
        """Keep nobody alive on our side of a cut: what is served there reaches nobody else."""
        while True:
            if await self._rules():
                leases.resume()
            else:
                leases.pause()
            await asyncio.sleep(_PAUSE_S)

    async def _lost_once(self, info: InstanceInfo, instance: Instance) -> None:
        """Wait for the loss of an instance; return if it was us who were lost."""
        try:
            await instance.ended()
        except BatonError:
            if await self._rules():
                raise
            while True:
                await asyncio.sleep(_PAUSE_S)
                if await self._rules():
                    break
            if not await self._answers(info):
                raise

    async def _answers(self, info: InstanceInfo) -> bool:
        for _ in range(_ANSWER_TRIES):
            if self._leases is None or self._leases.report(info) is not None:
                return True
            await asyncio.sleep(_PAUSE_S)
        return False

    def _gave_up(self, info: InstanceInfo, error: InstanceLost) -> None:
        watched, instance = self._watched.get(info.instance_id, (None, None))
        if instance is not None and watched == info:
            self._unreachable.add(info.instance_id)
            instance.give_up(error)
