"""A decode instance: engine, KV pool, transport and the Session service, put together."""

import grpc

from baton.core.clock import monotonic
from baton.core.errors import InvalidConfig
from baton.core.tasks import TaskSet
from baton.core.topology import Role
from baton.decode_worker.attempt import AttemptHost
from baton.decode_worker.backup import Backups
from baton.decode_worker.backup_store import BackupStore
from baton.decode_worker.owner import OwnerTable
from baton.decode_worker.peer_channels import PeerChannels
from baton.decode_worker.placement import Placement
from baton.decode_worker.service import DecodeService
from baton.executor.admission import Admission
from baton.executor.instance import Instance
from baton.executor.worker import Worker
from baton.proto import worker_pb2_grpc as pb_grpc

_DRAIN_S = 15.0
"""For open attempts to pass their fence when the worker closes."""


class DecodeWorker(Worker[OwnerTable]):
    """One running decode (or mixed) instance."""

    def __init__(self, instance: Instance, owners: OwnerTable) -> None:
        super().__init__(instance, owners)
        _expect_backup_possible(instance)
        channels, tasks = PeerChannels(instance.config.tls), TaskSet()
        self._host = AttemptHost(
            instance,
            channels,
            monotonic,
            tasks,
            Placement(instance.config.handover.disturbance_weight),
            Backups(instance, channels, tasks, monotonic),
            BackupStore(instance, tasks),
        )
        owners.host = self._host
        self._service = DecodeService(self._host, owners)

    @classmethod
    def new_listener(cls) -> OwnerTable:
        """See Worker."""
        return OwnerTable()

    def register(self, server: grpc.aio.Server) -> None:
        """See Worker."""
        pb_grpc.add_DecodeServicer_to_server(self._service, server)

    async def drain(self, deadline_s: float) -> int:
        """See Worker: gateways resume on other decode instances what is not done in time."""
        return await self._service.drain(deadline_s)

    async def fence(self) -> None:
        """See Worker."""
        await self._service.fence()

    @property
    def admission(self) -> Admission:
        """See Worker."""
        return self._service.admission

    async def wind_down(self) -> None:
        """See Worker."""
        await self._host.tasks.drain(_DRAIN_S)
        await self._host.channels.close()
        self._host.tasks.check()

    def problems(self) -> list[str]:
        """See Worker."""
        budget_s = self.instance.config.handover.stall_budget_s
        since = monotonic() - budget_s
        stalled = sum(attempt.reading_since < since for attempt in self._host.running)
        late = [f"{stalled} handovers have read for over {budget_s:g} s"] if stalled else []
        return self.instance.problems() + late

    def check(self) -> None:
        """See Worker."""
        self.instance.check(idle=len(self._host.tasks) == 0)

    def stats(self) -> dict[str, float | int | str]:
        """Return the instance's counters, and how requests ended."""
        finished = {f"finished_{name}": n for name, n in self._service.finished.items()}
        return {
            **self.instance.stats(),
            "open_requests": self._service.admission.open,
            "draining": int(self._service.admission.draining),
            "attempts": len(self._host.attempts),
            "tasks": len(self._host.tasks),
            "tasks_crashed": len(self._host.tasks.crashed),
            "channels": len(self._host.channels),
            "placed_here": self._host.placement.computed_here,
            "placed_on_prefill": self._host.placement.handed_over,
            "backup_blocks_given": self._host.backups.blocks,
            "backup_blocks_taken": self._host.store.pulls.blocks,
            "backups_declined": self._host.store.declined,
            "backups_failed": self._host.backups.failed,
            "backups_wrong": self._host.store.pulls.wrong,
            **finished,
        }


def _expect_backup_possible(instance: Instance) -> None:
    """Raise InvalidConfig if backup is asked for where KV cannot be read, or is not cached."""
    config = instance.config
    if config.handover.backup == "off":
        return
    if not config.engine.prefix_cache:
        raise InvalidConfig("prefix_cache", False, "True, with handover.backup")
    if config.role is not Role.DECODE or instance.memory.on_device:
        allowed = "off, but for decode instances whose KV pool is in host memory"
        raise InvalidConfig("handover.backup", config.handover.backup, allowed)
