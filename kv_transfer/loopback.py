"""A transport within one process, with the faults of a real one on demand; for tests of logic.

It copies when the event loop next comes round, so that whoever forgets to wait finds old bytes.
"""

import asyncio
import ctypes
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from baton.core.errors import PeerLost, TransportError
from baton.core.ids import Incarnation
from baton.kv_transfer.transport import (
    Metadata,
    Peer,
    PeerTable,
    Region,
    Run,
    Transfer,
    TransportStats,
    checked_runs,
)

_KIND = "loopback"


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
    transfer: Transfer
    runs: list[Run]


class LoopbackTransport:
    """Implements `Transport`; `hold`, `release`, `fail_next` and `corrupt_next` are its faults."""

    def __init__(
        self, region: Region, *, owner: str, incarnation: Incarnation, network: LoopbackNetwork
    ) -> None:
        self._region = region
        self._own = Metadata(owner, incarnation, region.address, region.length, b"", b"")
        self._network = network
        self._peers = PeerTable()
        self._jobs: list[_Job] = []
        self._lost: set[Peer] = set()
        self._held = False
        self._failures: list[TransportError] = []
        self._corruptions = 0
        self._bytes_read: Counter[str] = Counter()
        self._done = 0
        self._failed = 0
        self._closed = False
        network._live[owner, incarnation] = self

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self._peers)} peers, {len(self._jobs)} open"
        return f"<LoopbackTransport of {self._own.owner}, {self._region.length} bytes, {state}>"

    @property
    def name(self) -> str:
        """`loopback`."""
        return _KIND

    # Faults.

    def hold(self) -> None:
        """Let reads stay open until `release`."""
        self._held = True

    def release(self) -> None:
        """Go on with the reads that were held."""
        self._held = False
        for job in list(self._jobs):
            self._copy(job)

    def fail_next(self, error: TransportError) -> None:
        """Have the next read that would complete fail with `error`, nothing copied."""
        self._failures.append(error)

    def corrupt_next(self) -> None:
        """Flip the bits of one byte of the next read that completes; its report looks well."""
        self._corruptions += 1

    # Transport.

    def metadata(self) -> bytes:
        """See Transport."""
        return self._own.pack(_KIND)

    async def add_peer(self, metadata: bytes) -> Peer:
        """See Transport."""
        self._ensure_open()
        theirs = Metadata.unpack(metadata, _KIND)
        peer = self._peers.find(metadata, theirs)
        if peer is None or peer in self._lost:
            peer, old = self._peers.add(metadata, theirs)
            if old is not None:
                self._fence(old)
        return peer

    def read(self, peer: Peer, runs: Sequence[Run]) -> Transfer:
        """See Transport."""
        self._ensure_open()
        wanted = checked_runs(runs, self._region.length, peer.length)
        transfer = Transfer(peer, sum(run.length for run in wanted))
        if not wanted:
            transfer.finish("none")
            return transfer
        job = _Job(transfer, wanted)
        self._jobs.append(job)
        if peer in self._lost or self._network._find(peer) is None:
            self._lose(peer.owner, peer.incarnation)
        elif not self._held:
            asyncio.get_running_loop().call_soon(self._copy, job)
        return transfer

    async def remove_peer(self, peer: Peer) -> None:
        """See Transport."""
        self._peers.discard(peer)
        self._fence(peer)

    async def close(self) -> None:
        """See Transport."""
        if not self._closed:
            self._network._end(self._own.owner, self._own.incarnation)

    def check(self) -> None:
        """See Transport."""
        assert not self._jobs, self
        assert not len(self._peers), self

    def stats(self) -> TransportStats:
        """See Transport."""
        return TransportStats(
            bytes_read=dict(self._bytes_read),
            transfers_open=len(self._jobs),
            transfers_done=self._done,
            transfers_failed=self._failed,
            peers=len(self._peers),
        )

    def _ensure_open(self) -> None:
        if self._closed:
            raise TransportError("the transport is closed")

    def _copy(self, job: _Job) -> None:
        if self._held or job not in self._jobs:
            return
        if self._failures:
            self._finish(job, self._failures.pop(0))
            return
        source = self._network._find(job.transfer.peer)
        assert source is not None, "a job outlived its peer"
        to, origin = self._region.address, source._region.address
        for run in job.runs:
            ctypes.memmove(to + run.local_offset, origin + run.remote_offset, run.length)
        if self._corruptions:
            self._corruptions -= 1
            at = ctypes.c_ubyte.from_address(to + job.runs[0].local_offset)
            at.value ^= 0xFF
        self._finish(job, None)

    def _finish(self, job: _Job, error: TransportError | None) -> None:
        self._jobs.remove(job)
        if error is None:
            self._done += 1
            self._bytes_read[_KIND] += job.transfer.size
        else:
            self._failed += 1
        job.transfer.finish(_KIND, error)

    def _fence(self, peer: Peer) -> None:
        self._lost.add(peer)
        for job in [job for job in self._jobs if job.transfer.peer == peer]:
            self._finish(job, PeerLost(f"{peer} was removed"))

    def _lose(self, owner: str, incarnation: int) -> None:
        for job in list(self._jobs):
            peer = job.transfer.peer
            if (peer.owner, peer.incarnation) == (owner, incarnation):
                self._lost.add(peer)
                self._finish(job, PeerLost(f"{peer} is gone"))

    def _died(self) -> None:
        self._closed = True
        self._peers.clear()
        for job in list(self._jobs):
            self._finish(job, PeerLost(f"{self._own.owner} itself was closed"))
