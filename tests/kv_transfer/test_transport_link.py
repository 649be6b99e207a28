"""What is special to the transports over links, shm and tcp: who is let in, and to what."""

import asyncio
import contextlib
import ctypes
import mmap
import os
import signal
import socket
from collections.abc import AsyncIterator
from dataclasses import replace

import msgpack
import numpy as np
import pytest

from baton.core.errors import InvalidConfig, PeerLost, TransportError
from baton.core.ids import new_incarnation
from baton.kernels.kv_digest import Pieces
from baton.kv_transfer.link import reader
from baton.kv_transfer.link.backend import MAX_BYTES, MAX_RUNS, parts_of, parts_of_units
from baton.kv_transfer.link.transport import LinkTransport
from baton.kv_transfer.runs import RunTable
from baton.kv_transfer.shm import copying
from baton.kv_transfer.shm.memory import Mapping, SharedMemory
from baton.kv_transfer.tcp.backend import TcpBackend, notice_cuts
from baton.kv_transfer.transport import Metadata, ReadUnits, Run

from .transport_target import memory_of, opened
from .transport_worlds import SECRET, SIZE, WORLDS, ProcessWorld, pattern, region_of, soon

WHOLE = [Run(0, 0, SIZE)]


@pytest.fixture(params=["shm", "shm-cma", "tcp", "cuda_ipc"])
async def world(request: pytest.FixtureRequest) -> AsyncIterator[ProcessWorld]:
    world = await ProcessWorld(*WORLDS[request.param]).open()
    yield world
    await world.close()


async def test_a_peer_without_the_secret_is_not_read(world: ProcessWorld) -> None:
    metadata = await world.start_target(1, secret="the secret of another cluster")
    with pytest.raises(TransportError, match=r"prefill.* does not have this cluster's secret"):
        await soon(world.reader.add_peer(metadata))
    assert world.reader.stats().peers == 0


async def test_a_reader_without_the_secret_is_not_let_in(world: ProcessWorld) -> None:
    """It knows all but the secret, and does not care that the owner's proof looks wrong."""
    theirs = Metadata.unpack(await world.start_target(1), world.reader.name)
    with contextlib.closing(connect(world.reader.name, theirs)) as connection:
        hello = msgpack.packb(["decode", 1, theirs.owner, theirs.incarnation, b"n" * 16])
        connection.sendall(len(hello).to_bytes(2, "big") + hello)
        assert len(connection.recv(48, socket.MSG_WAITALL)) == 48
        connection.sendall(b"p" * 32 + (1).to_bytes(4, "big") + bytes(8) + b"\0" * 7 + b"\x08")
        assert received_all(connection) == b""


@pytest.mark.parametrize("said", [b"\xff\xff", b"GET / HTTP/1.1\r\n\r\n" + bytes(30_000)])
async def test_a_stranger_is_shown_out(world: ProcessWorld, said: bytes) -> None:
    metadata = await world.start_target(1)
    theirs = Metadata.unpack(metadata, world.reader.name)
    with contextlib.closing(connect(world.reader.name, theirs)) as connection:
        with contextlib.suppress(OSError):  # it may be shown out before it has said it all
            connection.sendall(said)
        assert received_all(connection) == b""
    peer = await soon(world.reader.add_peer(metadata))
    await soon(world.reader.read(peer, WHOLE).wait())
    assert (world.memory == pattern(1)).all()


async def test_another_incarnation_is_not_taken_for_the_one_meant(world: ProcessWorld) -> None:
    kind = world.reader.name
    theirs = Metadata.unpack(await world.start_target(1), kind)
    stale = replace(theirs, incarnation=theirs.incarnation ^ 1).pack(kind)
    with pytest.raises(TransportError, match="another incarnation has taken its address"):
        await soon(world.reader.add_peer(stale))


async def test_the_owner_too_refuses_what_leaves_its_region(world: ProcessWorld) -> None:
    """The reader is told of more memory than there is, so that its own check lets it pass."""
    kind = world.reader.name
    theirs = Metadata.unpack(await world.start_target(1), kind)
    longer = replace(theirs, length=SIZE * 2).pack(kind)

    async def read_beyond() -> None:
        peer = await world.reader.add_peer(longer)
        await world.reader.read(peer, [Run(0, SIZE, 8)]).wait()

    with pytest.raises(TransportError, match=r"refuses a run|not sealed at|not the .* bytes"):
        await soon(read_beyond())
    assert not world.memory.any()


async def test_bad_addresses_say_so(world: ProcessWorld) -> None:
    kind = world.reader.name
    theirs = Metadata.unpack(await world.start_target(1), kind)
    other_host = msgpack.packb(["another", "name"])
    for address in (b"", b"\xc1", b"127.0.0.1", b"127.0.0.1 port", other_host):
        with pytest.raises(TransportError, match=r"no address for|another host"):
            await soon(world.reader.add_peer(replace(theirs, address=address).pack(kind)))


async def test_tcp_gives_up_a_peer_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernel still answers, so no socket says that it hangs: the limit on every wait does."""
    monkeypatch.setattr(reader, "STALL_S", 0.2)
    world = await ProcessWorld(*WORLDS["tcp"]).open()
    peer = await soon(world.reader.add_peer(await world.start_target(1)))
    os.kill(world.target.pid, signal.SIGSTOP)
    await asyncio.to_thread(os.waitpid, world.target.pid, os.WUNTRACED)  # it takes a while
    with pytest.raises(PeerLost, match="not a byte came in time"):
        # More than fits into the sockets, of which it may have filled some.
        await soon(world.reader.read(peer, WHOLE).wait())
    os.kill(world.target.pid, signal.SIGCONT)
    await world.close()


def test_tcp_asks_the_kernel_to_notice_cuts() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as connection:
        notice_cuts(connection, 2.0)
        options = {
            name: connection.getsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_{name}"))
            for name in ("USER_TIMEOUT", "KEEPIDLE", "KEEPINTVL", "KEEPCNT")
        }
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    assert options == {"USER_TIMEOUT": 2000, "KEEPIDLE": 1, "KEEPINTVL": 1, "KEEPCNT": 2}


async def test_short_runs_are_copied_where_the_kernel_forbids_the_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As some sandboxes do, even for a process that reads itself."""
    monkeypatch.setattr(copying, "_CAN_READ_ITSELF", False)
    world = await ProcessWorld(*WORLDS["shm"]).open()
    peer = await soon(world.reader.add_peer(await world.start_target(1)))
    runs = [Run(4096 * i, 4096 * (i ^ 1), 4096) for i in range(64)]
    await soon(world.reader.read(peer, runs).wait())
    for run in runs:
        got = world.memory[run.local_offset : run.local_offset + 4096]
        assert (got == pattern(1)[run.remote_offset : run.remote_offset + 4096]).all()
    await world.close()


@pytest.mark.parametrize("kind", ["shm", "tcp"])
async def test_a_secret_that_can_be_guessed_is_refused(kind: str) -> None:
    region = region_of(np.zeros(8, np.uint8))
    with pytest.raises(InvalidConfig, match=r"handover.secret: '5 bytes'.*at least 16"):
        await opened(kind, region, owner="x", secret="short", options={})


async def test_ipv6_is_an_address_too() -> None:
    memory, source = np.zeros(SIZE, np.uint8), pattern(5)
    try:
        sides = [
            LinkTransport(
                region_of(bytes_),
                TcpBackend(region_of(bytes_), "::1"),
                owner=owner,
                incarnation=new_incarnation(),
                secret=SECRET.encode(),
            )
            for owner, bytes_ in (("decode", memory), ("prefill", source))
        ]
    except OSError:
        pytest.skip("this machine has no IPv6")
    ours, theirs = sides
    peer = await soon(ours.add_peer(theirs.metadata()))
    await soon(ours.read(peer, WHOLE).wait())
    assert (memory == source).all()
    await soon(theirs.close())
    await soon(ours.close())
    ours.check()


async def test_two_may_read_each_other(world: ProcessWorld) -> None:
    """Within one process, and at the same time."""
    memory, region = memory_of(world.kind, SIZE)
    memory[:] = pattern(9)
    other = await opened(world.kind, region, owner="other", secret=SECRET, options={})
    to_other = await soon(world.reader.add_peer(other.metadata()))
    to_reader = await soon(other.add_peer(world.reader.metadata()))
    half = SIZE // 2
    await soon(
        asyncio.gather(
            world.reader.read(to_other, [Run(0, 0, half)]).wait(),
            other.read(to_reader, [Run(half, half, half)]).wait(),
        )
    )
    assert (world.memory[:half] == pattern(9)[:half]).all()
    assert not memory[half:].any()
    await soon(other.close())
    with pytest.raises(PeerLost):
        await soon(world.reader.read(to_other, [Run(0, 0, half)]).wait())


def test_parts_are_bounded_and_cover_all() -> None:
    runs = [Run(i * 10, i * 20, 10) for i in range(MAX_RUNS + 3)]
    runs.append(Run(1 << 20, 1 << 21, 2 * MAX_BYTES + 5))
    parts = [list(part) for part in parts_of(RunTable.of(runs))]
    assert max(len(part) for part in parts) == MAX_RUNS
    assert max(sum(run.length for run in part) for part in parts) == MAX_BYTES
    flat = [run for part in parts for run in part]
    assert flat[: MAX_RUNS + 3] == runs[:-1]
    at = 0
    for run in flat[MAX_RUNS + 3 :]:
        assert (run.local_offset, run.remote_offset) == ((1 << 20) + at, (1 << 21) + at)
        at += run.length
    assert at == 2 * MAX_BYTES + 5


def test_parts_of_units_are_cut_between_units() -> None:
    half = MAX_BYTES // 2
    lengths = np.array([half, 1, half - 1, half, MAX_BYTES, 7, 7], np.int64)
    ends = np.array([2, 3, 5, 6, 7], np.int64)
    at = np.cumsum(lengths) - lengths
    labels = np.arange(5, dtype=np.uint8)[:, None].repeat(64, axis=1)
    units = ReadUnits(b"", labels, Pieces(at, lengths, ends), at + 1)
    parts = list(parts_of_units(units, int(lengths.sum())))
    assert [part.pieces.lengths.tolist() for part in parts] == [
        [half, 1, half - 1],
        [half, MAX_BYTES],  # one unit, longer than a part
        [7, 7],
    ]
    assert [part.pieces.ends.tolist() for part in parts] == [[2, 3], [2], [1, 2]]
    assert [part.labels[:, 0].tolist() for part in parts] == [[0, 1], [2], [3, 4]]
    for part in parts:
        assert (part.into == part.pieces.offsets + 1).all()
    assert np.array_equal(np.concatenate([part.pieces.offsets for part in parts]), at)


def test_shared_memory_is_written_by_its_owner_alone() -> None:
    shared = SharedMemory(1 << 16)
    shared.buffer[:3] = b"abc"
    with pytest.raises(PermissionError):
        mmap.mmap(shared.fd, 1 << 16)
    with pytest.raises(PermissionError):
        os.ftruncate(shared.fd, 1)
    with pytest.raises(PermissionError):
        os.pwrite(shared.fd, b"x", 0)
    mapping = Mapping(os.dup(shared.fd), 1 << 16)
    assert ctypes.string_at(mapping.address, 3) == b"abc"
    shared.buffer[:3] = b"xyz"
    assert ctypes.string_at(mapping.address, 3) == b"xyz"
    mapping.close()


def test_memory_that_could_be_cut_short_is_not_mapped() -> None:
    fd = os.memfd_create("unsealed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 4096)
    with pytest.raises(TransportError, match="not sealed"):
        Mapping(fd, 4096)
    shared = SharedMemory(4096)
    with pytest.raises(TransportError, match="not sealed at 8192 bytes"):
        Mapping(os.dup(shared.fd), 8192)


def connect(kind: str, theirs: Metadata) -> socket.socket:
    """Return a bare connection to where a target listens."""
    if kind == "tcp":
        host, port = theirs.address.decode().split()
        return socket.create_connection((host, int(port)), 10)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(10)
    connection.connect("\0" + msgpack.unpackb(theirs.address)[1])
    return connection


def received_all(connection: socket.socket) -> bytes:
    """Return what comes until the other side closes."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(4096):
            received += piece
    return received
