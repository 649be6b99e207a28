"""A transport within one process, with the faults of a real one by plan; for tests of logic.

It copies when the event loop next comes round, so that whoever forgets to wait finds old bytes.
"""

import asyncio
import ctypes
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from baton.core.errors import PeerLost, TransportError
from baton.core.ids import Incarnation
from baton.kv_transfer.base import NOTHING_TO_DO, BaseTransport, Done
from baton.kv_transfer.faults import Fault, FaultPlan
from baton.kv_transfer.runs import RunTable
from baton.kv_transfer.transport import Metadata, Peer, Region, Run, Transfer, UnitsOf

_KIND = "loopback"
_MAX_TURNS = 20
"""Turns of the event loop that a late read waits at most."""


class LoopbackNetwork:
    """Where the transports of one make-believe network find each other."""

    def __init__(self) -> None:
        self._live: dict[tuple[str, int], LoopbackTransport] = {}

    def __repr__(self) -> str:
        return f"LoopbackNetwork({[owner for owner, _ in self._live]})"

    def kill(self, owner: str) -> None:
        """End `owner` as SIGKILL would: reads of it fail, and nobody is told by it."""
        for key in [key for key in self._live if key[0] == owner]:
            self._end(*key)

    def _end(self, owner: str, incarnation: int) -> None:
        self._live.pop((owner, incarnation))._died()
        for other in self._live.values():
            other._lose(owner, incarnation)

    def _find(self, peer: Peer) -> "LoopbackTransport | None":
        return self._live.get((peer.owner, peer.incarnation))


@dataclass(eq=False, slots=True)
class _Job:
    number: int
    """Counts the reads of the transport."""
    transfer: Transfer
    runs: list[Run]
    fault: Fault | None
    turns: int
    """How many turns of the event loop it still waits."""
    copied: bool = False


class LoopbackTransport(BaseTransport):
    """Implements `Transport`; `plan` says what goes wrong, `hold` and `release` when it goes on."""

    def __init__(
        self,
        region: Region,
        *,
        owner: str,
        incarnation: Incarnation,
        network: LoopbackNetwork,
        plan: FaultPlan = FaultPlan(),  # noqa: B008  (frozen)
    ) -> None:
        own = Metadata(owner, incarnation, region.address, region.length, b"", b"")
        super().__init__(_KIND, region, own)
        self._network = network
        self._plan = plan
        self._jobs: list[_Job] = []
        self._lost: set[Peer] = set()
        self._held = False
        self.faults: Counter[Fault] = Counter()
        """How often each fault has struck."""
        network._live[owner, incarnation] = self

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self._peers)} peers, {len(self._jobs)} open"
        return f"<LoopbackTransport of {self._own.owner}, {self._region.length} bytes, {state}>"

    def hold(self) -> None:
        """Let reads stay open until `release`."""
        self._held = True

    def release(self) -> None:
        """Go on with the reads that were held."""
        self._held = False
        for job in list(self._jobs):
            self._turn(job)

    def check(self) -> None:
        """See Transport."""
        super().check()
        assert not self._jobs, self

    def _connect(self, peer: Peer, theirs: Metadata) -> Done:
        return NOTHING_TO_DO

    def _disconnect(self, peer: Peer) -> Done:
        self._lost.add(peer)
        for job in [job for job in self._jobs if job.transfer.peer == peer]:
            self._finish(job, PeerLost(f"{peer} was removed"))
        return NOTHING_TO_DO

    def _usable(self, peer: Peer) -> bool:
        return peer not in self._lost

    def _post(self, transfer: Transfer, runs: RunTable, units: UnitsOf | None) -> None:
        peer = transfer.peer
        job = self._job(transfer, list(runs))
        self._jobs.append(job)
        if peer in self._lost or self._network._find(peer) is None:
            self._lose(peer.owner, peer.incarnation)
        elif not self._held:
            asyncio.get_running_loop().call_soon(self._turn, job)

    async def _shut(self) -> None:
        if (self._own.owner, self._own.incarnation) in self._network._live:
            self._network._end(self._own.owner, self._own.incarnation)

    def _job(self, transfer: Transfer, runs: list[Run]) -> _Job:
        number = self._counters.posted
        fault = self._plan.fault(number)
        turns = 0
        if fault is not None:
            self.faults[fault] += 1
            if fault in (Fault.LATE, Fault.TWICE, Fault.OUT_OF_ORDER):
                turns = 1 + self._plan.draw(number, _MAX_TURNS)
        return _Job(number, transfer, runs, fault, turns)

    def _turn(self, job: _Job) -> None:
        """Go on with `job`, now that the event loop comes round."""
        if self._held or job not in self._jobs or job.fault is Fault.HANG:
            return
        if job.fault is Fault.TWICE and not job.copied:
            job.copied = True
            self._copy(job)
        if job.turns and not self._overtaken(job):
            job.turns -= 1
            asyncio.get_running_loop().call_soon(self._turn, job)
            return
        if job.fault is Fault.FAIL:
            self._finish(job, TransportError("the read failed, as planned"))
        elif job.fault is Fault.DIE:
            self._copy(job, runs=job.runs[: len(job.runs) // 2])
            self._network.kill(job.transfer.peer.owner)
        else:
            self._copy(job)
            self._finish(job, None)

    def _overtaken(self, job: _Job) -> bool:
        """Whether a read posted after `job` has completed, if that is what it waits for."""
        later = self._counters.posted - 1 - job.number
        still_open = sum(other.number > job.number for other in self._jobs)
        return job.fault is Fault.OUT_OF_ORDER and still_open < later

    def _copy(self, job: _Job, runs: Sequence[Run] | None = None) -> None:
        source = self._network._find(job.transfer.peer)
        assert source is not None, "a job outlived its peer"
        to, origin = self._region.address, source._region.address
        runs = job.runs if runs is None else runs
        for run in runs:
            length = run.length // 2 if job.fault is Fault.TRUNCATED else run.length
            ctypes.memmove(to + run.local_offset, origin + run.remote_offset, length)
        if job.fault is Fault.FLIPPED:
            run = runs[self._plan.draw(job.number, len(runs))]
            bit = self._plan.draw(job.number, run.length * 8)
            byte = ctypes.c_ubyte.from_address(to + run.local_offset + bit // 8)
            byte.value ^= 1 << bit % 8

    def _finish(self, job: _Job, error: TransportError | None) -> None:
        self._jobs.remove(job)
        self._counters.ended(job.transfer, _KIND, error)

    def _lose(self, owner: str, incarnation: int) -> None:
        for job in list(self._jobs):
            peer = job.transfer.peer
            if (peer.owner, peer.incarnation) == (owner, incarnation):
                self._lost.add(peer)
                self._finish(job, PeerLost(f"{peer} is gone"))

    def _died(self) -> None:
        self._closed = True
        self._peers.clear()
        self._connected.clear()
        for job in list(self._jobs):
            self._finish(job, PeerLost(f"{self._own.owner} itself was closed"))
