"""A prefill instance: engine, KV pool, transport and the Handover service, put together."""

import grpc

from baton.core.clock import monotonic
from baton.executor.admission import Admission
from baton.executor.instance import Instance
from baton.executor.worker import Worker
from baton.prefill_worker.service import PrefillService
from baton.prefill_worker.session import SessionTable
from baton.proto import worker_pb2_grpc as pb_grpc

_DRAIN_S = 15.0
"""For pulls to pass their fence when the worker closes."""


class PrefillWorker(Worker[SessionTable]):
    """One running prefill instance."""

    def __init__(self, instance: Instance, table: SessionTable) -> None:
        super().__init__(instance, table)
        self._table = table
        table.instance = instance
        self._service = PrefillService(instance, table, monotonic)

    @classmethod
    def new_listener(cls) -> SessionTable:
        """See Worker."""
        return SessionTable()

    def register(self, server: grpc.aio.Server) -> None:
        """See Worker."""
        pb_grpc.add_PrefillServicer_to_server(self._service, server)

    async def drain(self, deadline_s: float) -> int:
        """See Worker: decode takes to other prefill instances what is not done in time."""
        return await self._service.drain(deadline_s)

    async def fence(self) -> None:
        """See Worker."""
        await self._service.fence()

    @property
    def admission(self) -> Admission:
        """See Worker."""
        return self._service.admission

    async def wind_down(self) -> None:
        """See Worker: sessions have ended with their streams; pulls may have a fence to pass."""
        await self._table.tasks.drain(_DRAIN_S)
        self._table.tasks.check()

    def problems(self) -> list[str]:
        """See Worker."""
        budget_s = self.instance.config.handover.unread_budget_s
        since = monotonic() - budget_s
        unread = sum(session.unread_since < since for session in self._table.values())
        late = (
            [f"{unread} handovers were offered and not read for {budget_s:g} s"] if unread else []
        )
        return self.instance.problems() + late

    def check(self) -> None:
        """See Worker."""
        self.instance.check(idle=not self._table and not self._table.tasks)

    def stats(self) -> dict[str, float | int | str]:
        """Return the instance's counters, and how handovers ended."""
        outcomes = {f"handover_{name}": n for name, n in self._service.outcomes.items()}
        return {
            **self.instance.stats(),
            "sessions": len(self._table),
            "tasks": len(self._table.tasks),
            "tasks_crashed": len(self._table.tasks.crashed),
            "draining": int(self._service.admission.draining),
            "blocks_pulled": self._table.pulls.blocks,
            "pulls_wrong": self._table.pulls.wrong,
            **outcomes,
        }
