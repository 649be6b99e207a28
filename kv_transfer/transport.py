"""The seam between the handover and the libraries that move bytes: one-sided reads of a peer.

Each process registers one region, its KV pool, and tells others by `metadata()` how to read it.
Only the reader acts: the owner of the memory posts nothing and is told nothing.

    reader                                       owner of the memory
      add_peer(metadata) ◀─── by the handshake ─── metadata()
      read(peer, runs) ──────── pulls ───────────▶ region
      remove_peer(peer)        the fence: after it nothing of that peer lands here any more
"""

import asyncio
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import msgpack

from baton.core.errors import TransportError
from baton.core.ids import NO_TICKET, Incarnation, Ticket
from baton.kernels.kv_digest import Digests, Labels, Pieces
from baton.kernels.native.kv_digest import Ints
from baton.kv_transfer.device_driver import DeviceDriver

METADATA_VERSION = 2
"""Both sides must speak the same version of `metadata()`."""

_MAGIC = "baton-kv"


@dataclass(frozen=True, slots=True)
class Region:
    """The memory that a process registers; host or device memory."""

    address: int
    length: int
    """In bytes."""
    keepalive: object
    """Owns the memory; held until the transport is closed."""
    fd: int | None = None
    """Descriptor of exactly this memory, if others may map it; see shm/memory.py."""
    device: DeviceDriver | None = None
    """Of the device that it lies on; None for host memory."""


@dataclass(frozen=True, slots=True)
class Run:
    """Bytes to copy from the peer's region to one's own; offsets from the start of each region."""

    local_offset: int
    remote_offset: int
    length: int


@dataclass(frozen=True, slots=True)
class ReadUnits:
    """The bytes of a read cut into units that have a hash each; see kernels/kv_digest.py."""

    key: bytes
    labels: Labels
    pieces: Pieces
    """Of the units, in the peer's region."""
    into: Ints
    """Where each piece goes in one's own region [pieces]."""


@dataclass(frozen=True, slots=True)
class TransferReport:
    """What a completed transfer moved, and how."""

    bytes: int
    seconds: float
    """From `read` until the last byte was in place."""
    transport: str
    """What carried its largest read: `shm` (memory mapped by the reader), `shm-cma` (copied by the
    kernel), `cuda_ipc` (copied by the reader's GPU), `tcp`; over UCX what it says itself: `cma`,
    `tcp`, `rc_mlx5`…, several joined by `+`; `none` if there was nothing to read."""


@dataclass(frozen=True, slots=True)
class Peer:
    """One connection to one incarnation of a process whose region can be read."""

    owner: str
    incarnation: Incarnation
    length: int
    """Of the peer's region, in bytes."""
    number: int
    """Never used twice by the same transport."""

    def __str__(self) -> str:
        return f"{self.owner} (incarnation {self.incarnation})"


@dataclass(frozen=True, slots=True)
class TransportStats:
    """What a transport has done since it was opened, and what it holds now."""

    bytes_read: Mapping[str, int]
    """By the transport that carried them."""
    transfers_open: int
    transfers_done: int
    transfers_failed: int
    peers: int
    fallbacks: int = 0
    """How often another way than the preferred one was taken."""
    refused: int = 0
    """Reads by others that their ticket did not open, where that can be seen."""
    tickets_open: int = 0
    """Tickets of others that open something, where the owner of the memory asks for them."""


class Transfer:
    """Reads that were posted together."""

    def __init__(self, peer: Peer, size: int, ticket: Ticket = NO_TICKET) -> None:
        self.peer = peer
        self.size = size
        self.ticket = ticket
        """By which it reads."""
        self._posted_at = time.perf_counter()
        self._loop = asyncio.get_running_loop()
        self._future: asyncio.Future[TransferReport] = self._loop.create_future()
        self._future.add_done_callback(_mark_seen)
        self._completed = False
        self.hashes: Digests | None = None
        """Of the units of the read, taken of what was written as it was written; None before the
        transfer has completed well, and where the transport does not hash."""

    def __repr__(self) -> str:
        state = "completed" if self._completed else "open"
        return f"<Transfer of {self.size} bytes from {self.peer}, {state}>"

    @property
    def completed(self) -> bool:
        """True once nothing of this transfer can be written to local memory any more.

        This is the fence: the local blocks may be freed exactly then, whether it went well or not.
        """
        return self._completed

    async def wait(self) -> TransferReport:
        """Return the report once the transfer has completed.

        To cancel the waiting task leaves the transfer as it is: it goes on to completion.

        Raises PeerLost if the peer went away or was removed, TransportError if a read failed.
        """
        return await asyncio.shield(self._future)

    def then(self, callback: Callable[[TransferReport | TransportError], None]) -> None:
        """Call `callback` in the event loop with the outcome, once the transfer has completed."""

        def call(future: "asyncio.Future[TransferReport]") -> None:
            if not future.cancelled():
                error = future.exception()
                assert error is None or isinstance(error, TransportError)
                callback(future.result() if error is None else error)

        self._future.add_done_callback(call)

    def finish(
        self,
        transport: str,
        error: TransportError | None = None,
        hashes: Digests | None = None,
    ) -> None:
        """Complete the transfer; for the transport only, once, from any thread."""
        assert not self._completed, self
        self.hashes = hashes
        self._completed = True
        report = TransferReport(self.size, time.perf_counter() - self._posted_at, transport)
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_resolve, self._future, report, error)


def _mark_seen(future: "asyncio.Future[TransferReport]") -> None:
    if not future.cancelled():
        future.exception()  # a transfer that failed and that nobody awaits is no news


def _resolve(
    future: "asyncio.Future[TransferReport]", report: TransferReport, error: TransportError | None
) -> None:
    if future.cancelled():  # the loop is being torn down
        return
    if error is None:
        future.set_result(report)
    else:
        future.set_exception(error)


UnitsOf = Callable[[], ReadUnits]


class Transport(Protocol):
    """Reads of other processes' regions. One event loop uses it; the reads run beside that loop."""

    @property
    def name(self) -> str:
        """The kind: `ucx`, `shm`, `tcp`, `loopback`…; both sides must be of one kind."""

    def metadata(self) -> bytes:
        """Return what another process needs to read this one's region."""

    async def add_peer(self, metadata: bytes) -> Peer:
        """Make the process that gave `metadata` readable.

        The same metadata again gives the same peer, unless its connection was lost: then a new
        one. Another incarnation of a known owner replaces the old one, which is fenced first; an
        incarnation that was replaced never comes back.

        Raises TransportError if the metadata is not valid, not of this version or out of date.
        """

    def grant(self, ticket: Ticket, offsets: Ints, lengths: Ints) -> None:
        """Let whoever has `ticket` read these runs of one's own region too.

        Where the owner of the memory is not asked when it is read, this changes nothing.
        """

    def revoke(self, ticket: Ticket) -> None:
        """Take back all that was granted to `ticket`; safe to repeat."""

    def read(
        self,
        peer: Peer,
        runs: Sequence[Run],
        units: UnitsOf | None = None,
        ticket: Ticket = NO_TICKET,
    ) -> Transfer:
        """Start to copy `runs` from the peer's region into one's own.

        Runs must not overlap on the local side. With no runs the transfer is completed at once.
        A peer that is lost or removed gives a transfer that fails with PeerLost, one that has not
        granted the runs to `ticket` one that fails with TransportError.

        `units` returns the same bytes as units. A transport that copies them itself calls it, in
        a thread of its own, and gives the transfer their hashes; others leave it alone.

        Raises TransportError if a run leaves either region, or too much is waiting already.
        """

    async def remove_peer(self, peer: Peer) -> None:
        """Close the connection; return when all transfers of that peer have completed.

        Those that were open fail with PeerLost. Safe to repeat; cancelling it undoes nothing.
        """

    async def close(self) -> None:
        """Remove all peers and give the region back. Safe to repeat."""

    def check(self) -> None:
        """Assert that no transfer is open and no peer is left."""

    def stats(self) -> TransportStats:
        """Return the counters."""


@dataclass(frozen=True, slots=True)
class Metadata:
    """What `Transport.metadata` says about a region."""

    owner: str
    """Names the process, the same after a restart."""
    incarnation: int
    base: int
    """Address of the region in its process."""
    length: int
    address: bytes
    """How to reach the process, in the words of the library."""
    key: bytes
    """Right to read the region, in the words of the library."""

    def pack(self, kind: str) -> bytes:
        """Return the bytes for the wire: [magic, version, kind, body, CRC-32 of the body]."""
        body: bytes = msgpack.packb(asdict(self))
        packed: bytes = msgpack.packb([_MAGIC, METADATA_VERSION, kind, body, zlib.crc32(body)])
        return packed

    @staticmethod
    def unpack(packed: bytes, kind: str) -> "Metadata":
        """Return what `pack` was given on the other side.

        The checksum keeps damaged bytes from the library, which trusts its own words; it is no
        protection from a peer that means harm.

        Raises TransportError, saying what is wrong.
        """
        try:
            magic, version, theirs, body, crc = msgpack.unpackb(packed)
            known = magic == _MAGIC
        except (ValueError, TypeError, msgpack.UnpackException):
            known = False
        if not known:
            raise TransportError("this is not the metadata of a transport")
        if version != METADATA_VERSION:
            raise TransportError(
                f"transport metadata of version {version}; this side has {METADATA_VERSION}"
            )
        if theirs != kind:
            raise TransportError(f"the peer's transport is {theirs}; this side's is {kind}")
        if not isinstance(body, bytes) or zlib.crc32(body) != crc:
            raise TransportError("the transport metadata is damaged: its checksum is wrong")
        try:
            fields = msgpack.unpackb(body)
        except (ValueError, TypeError, msgpack.UnpackException) as error:
            raise TransportError(f"the transport metadata cannot be read: {error}") from error
        return _metadata_from(fields)


def _metadata_from(fields: Any) -> Metadata:
    try:
        metadata = Metadata(**fields)
    except TypeError as error:
        raise TransportError(f"the transport metadata is not complete: {error}") from error
    for name, kind in Metadata.__annotations__.items():
        if not isinstance(getattr(metadata, name), kind):
            raise TransportError(f"transport metadata: {name} must be {kind.__name__}")
    return metadata


class PeerTable:
    """The peers of one transport, one for each owner; decides which replaces which."""

    def __init__(self) -> None:
        self._current: dict[str, tuple[Peer, bytes]] = {}
        self._replaced: dict[str, set[int]] = {}
        self._last_number = 0

    def __len__(self) -> int:
        return len(self._current)

    def __repr__(self) -> str:
        return f"PeerTable({[str(peer) for peer, _ in self._current.values()]})"

    def find(self, packed: bytes, theirs: Metadata) -> Peer | None:
        """Return the peer that was added with exactly this metadata."""
        peer, known = self._current.get(theirs.owner, (None, b""))
        return peer if known == packed else None

    def add(self, packed: bytes, theirs: Metadata) -> tuple[Peer, Peer | None]:
        """Return a new peer, and the one of the same owner that it replaces and that must go.

        Raises TransportError if this incarnation was itself replaced before.
        """
        old, _ = self._current.get(theirs.owner, (None, b""))
        replaced = self._replaced.setdefault(theirs.owner, set())
        if theirs.incarnation in replaced:
            raise TransportError(
                f"{theirs.owner}: incarnation {theirs.incarnation} was replaced by a newer one"
            )
        if old is not None and old.incarnation != theirs.incarnation:
            replaced.add(old.incarnation)
        self._last_number += 1
        incarnation = Incarnation(theirs.incarnation)
        peer = Peer(theirs.owner, incarnation, theirs.length, self._last_number)
        self._current[theirs.owner] = (peer, packed)
        return peer, old

    def discard(self, peer: Peer) -> None:
        """Forget `peer`, unless another has replaced it already."""
        if self._current.get(peer.owner, (None, b""))[0] is peer:
            del self._current[peer.owner]

    def clear(self) -> None:
        """Forget all peers."""
        self._current.clear()
