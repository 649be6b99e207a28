"""A transport that does, now and then, what networks, drivers and bugs do to a read.

It stands before the real one. A read that is struck has completed, fault and all, before it says
so: afterwards nothing is written any more, as `Transport` promises. Its bytes may be wrong.
"""

import asyncio
import ctypes
import random
from collections.abc import Sequence
from dataclasses import replace

from baton.core.errors import PeerLost, TransportError
from baton.core.ids import NO_TICKET, Ticket
from baton.kernels.native.kv_digest import Ints
from baton.kv_transfer.runs import checked_runs
from baton.kv_transfer.transport import (
    Peer,
    Region,
    Run,
    Transfer,
    Transport,
    TransportStats,
    UnitsOf,
)

from .armed import Armed
from .schedule import WRONG_BYTES, Fault

_LAST_BYTES_AFTER_S = 0.05
"""From the order to close a connection until its reads have completed."""


class FaultyTransport:
    """Implements `Transport` over another one, which it owns."""

    def __init__(self, inner: Transport, region: Region, armed: Armed) -> None:
        self._inner = inner
        self._region = region
        self._armed = armed
        self._tasks: set[asyncio.Task[None]] = set()
        self._dropped: dict[Peer, asyncio.Event] = {}

    def __repr__(self) -> str:
        return f"<FaultyTransport, {len(self._tasks)} struck reads open, over {self._inner!r}>"

    @property
    def name(self) -> str:
        """See Transport."""
        return self._inner.name

    def metadata(self) -> bytes:
        """See Transport."""
        return self._inner.metadata()

    async def add_peer(self, metadata: bytes) -> Peer:
        """See Transport."""
        peer = await self._inner.add_peer(metadata)
        for old in [p for p in self._dropped if p.owner == peer.owner and p != peer]:
            await self._fence(old)
        self._dropped.setdefault(peer, asyncio.Event())
        return peer

    def grant(self, ticket: Ticket, offsets: Ints, lengths: Ints) -> None:
        """See Transport."""
        self._inner.grant(ticket, offsets, lengths)

    def revoke(self, ticket: Ticket) -> None:
        """See Transport."""
        self._inner.revoke(ticket)

    def read(
        self,
        peer: Peer,
        runs: Sequence[Run],
        units: UnitsOf | None = None,
        ticket: Ticket = NO_TICKET,
    ) -> Transfer:
        """See Transport. A read that is struck has no hashes: its bytes change once they landed."""
        due = self._armed.happened("read") if runs else []
        if not due:
            return self._inner.read(peer, runs, units, ticket)
        wanted = list(checked_runs(runs, self._region.length, peer.length))
        transfer = Transfer(peer, sum(run.length for run in wanted), ticket)
        task = asyncio.create_task(
            self._struck_read(transfer, wanted, due[0]), name=f"read of {peer.number}"
        )
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return transfer

    async def remove_peer(self, peer: Peer) -> None:
        """See Transport."""
        await self._inner.remove_peer(peer)
        await self._fence(peer)

    async def close(self) -> None:
        """See Transport."""
        await self._inner.close()
        for peer in list(self._dropped):
            await self._fence(peer)

    def check(self) -> None:
        """See Transport."""
        assert not self._tasks, self
        self._inner.check()

    def stats(self) -> TransportStats:
        """See Transport; a read that was struck counts as one that is open until it is over."""
        inner = self._inner.stats()
        return replace(inner, transfers_open=inner.transfers_open + len(self._tasks))

    async def _fence(self, peer: Peer) -> None:
        """End the struck reads of a peer that is gone, and wait until they have ended."""
        if peer in self._dropped:
            self._dropped.pop(peer).set()
        while of_peer := [
            task for task in self._tasks if task.get_name() == f"read of {peer.number}"
        ]:
            await asyncio.wait(of_peer)

    async def _struck_read(self, transfer: Transfer, runs: list[Run], fault: Fault) -> None:
        try:
            transport = await self._strike(transfer, runs, fault)
        except TransportError as error:
            transfer.finish("none", error)
        else:
            transfer.finish(transport)

    async def _strike(self, transfer: Transfer, runs: list[Run], fault: Fault) -> str:
        """Read with a fault; return what carried it."""
        peer, ticket = transfer.peer, transfer.ticket
        dropped = self._dropped.get(peer)
        if dropped is None:
            raise PeerLost(f"{peer} was removed")
        kind = fault.kind.removeprefix("pull_")
        match kind:
            case "fail":
                self._armed.struck(fault, f"the read from {peer}")
                raise TransportError("this read was made to fail")
            case "hang":
                self._armed.struck(fault, f"the read from {peer}")
                await dropped.wait()
            case "late":
                self._armed.struck(fault, f"the read from {peer}")
                await _wait(dropped, fault.seconds)
            case "twice":
                await self._inner.read(peer, runs[::-1], ticket=ticket).wait()
                self._armed.struck(fault, f"the read from {peer}")
        if dropped.is_set():
            await self._land_until_the_fence(runs, fault)
            raise PeerLost(f"{peer} was removed")
        before = [ctypes.string_at(self._at(run), run.length) for run in runs]
        report = await self._inner.read(peer, runs, ticket=ticket).wait()
        if kind in WRONG_BYTES:
            self._spoil(runs, before, fault)
        return report.transport

    async def _land_until_the_fence(self, runs: list[Run], fault: Fault) -> None:
        """Write something, as a read that is cut off may until it has completed: who has given
        the blocks to others before that finds it there."""
        await asyncio.sleep(_LAST_BYTES_AFTER_S)
        draw = random.Random(fault.seed)
        for run in runs:
            ctypes.memmove(self._at(run), draw.randbytes(run.length), run.length)

    def _spoil(self, runs: list[Run], before: list[bytes], fault: Fault) -> None:
        """Leave other bytes in one of the runs than those that were read."""
        draw = random.Random(fault.seed)
        index = draw.randrange(len(runs))
        run = runs[index]
        right = ctypes.string_at(self._at(run), run.length)
        wrong = bytearray(right)
        match fault.kind.removeprefix("pull_"):
            case "stale":
                wrong[:] = before[index]
            case "truncate":
                kept = draw.randrange(run.length)
                wrong[kept:] = before[index][kept:]
            case "foreign":
                start = draw.randrange(0, self._region.length - run.length + 1, 64)
                wrong[:] = ctypes.string_at(self._region.address + start, run.length)
        if wrong == right:  # the old bytes were the new ones
            wrong[draw.randrange(run.length)] ^= 1 << draw.randrange(8)
        ctypes.memmove(self._at(run), bytes(wrong), run.length)
        self._armed.struck(fault, f"{run}")

    def _at(self, run: Run) -> int:
        return self._region.address + run.local_offset


async def _wait(event: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        pass
