"""The contract of `Transport`, kept by every implementation."""

import asyncio
import contextlib
import os
import signal
import zlib
from collections.abc import AsyncIterator
from dataclasses import replace

import msgpack
import numpy as np
import pytest

from baton.core.errors import PeerLost, TransportError
from baton.kernels.kv_digest import Pieces, expand_key, hash_units, is_native
from baton.kv_transfer.link import backend
from baton.kv_transfer.transport import METADATA_VERSION, Metadata, ReadUnits, Run

from .transport_worlds import (
    SIZE,
    WORLDS,
    ProcessWorld,
    World,
    open_world,
    pattern,
    soon,
)

WHOLE = [Run(0, 0, SIZE)]
PIECE = 24 << 10


@pytest.fixture(params=["loopback", *WORLDS])
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    world = await open_world(request.param)
    yield world
    await world.close()


@pytest.fixture(params=list(WORLDS))
async def process_world(request: pytest.FixtureRequest) -> AsyncIterator[ProcessWorld]:
    world = await ProcessWorld(*WORLDS[request.param]).open()
    yield world
    await world.close()


def scattered(count: int) -> list[Run]:
    """Return `count` runs of PIECE bytes in a wild order, none of them neighbours on both sides."""
    pieces = SIZE // PIECE
    draw = np.random.default_rng(0)
    local, remote = draw.permutation(pieces)[:count], draw.permutation(pieces)[:count]
    return [Run(int(a) * PIECE, int(b) * PIECE, PIECE) for a, b in zip(local, remote, strict=True)]


def in_units(runs: list[Run], pieces: int) -> ReadUnits:
    """Return `runs` as units of so many of them."""
    rows = [(run.local_offset, run.remote_offset, run.length) for run in runs]
    local, remote, length = np.array(rows, np.int64).T.copy()
    ends = np.arange(pieces, len(runs) + pieces, pieces).clip(max=len(runs))
    labels = np.random.default_rng(1).integers(0, 256, (ends.size, 64), np.uint8)
    return ReadUnits(expand_key(b"test"), labels, Pieces(remote, length, ends), local)


async def test_reads_what_the_peer_has_and_says_how(world: World) -> None:
    peer = await soon(world.reader.add_peer(await world.start_target(1)))
    runs = scattered(200)
    transfer = world.reader.read(peer, runs)
    report = await soon(transfer.wait())
    assert transfer.completed
    source, want = pattern(1), np.zeros(SIZE, np.uint8)
    for run in runs:
        piece = source[run.remote_offset : run.remote_offset + PIECE]
        want[run.local_offset : run.local_offset + PIECE] = piece
    assert (world.memory == want).all()
    assert (report.bytes, report.transport) == (200 * PIECE, world.carrier)
    assert report.seconds > 0
    stats = world.reader.stats()
    assert stats.bytes_read == {world.carrier: 200 * PIECE}
    assert (stats.transfers_open, stats.transfers_done, stats.transfers_failed) == (0, 1, 0)
    assert stats.peers == 1


async def test_many_transfers_at_once(world: World) -> None:
    peer = await soon(world.reader.add_peer(await world.start_target(1)))
    transfers = [world.reader.read(peer, [run]) for run in scattered(300)]
    await soon(asyncio.gather(*(transfer.wait() for transfer in transfers)))
    assert all(transfer.completed for transfer in transfers)


async def test_nothing_to_read_completes_at_once(world: World) -> None:
    peer = await soon(world.reader.add_peer(await world.start_target(1)))
    transfer = world.reader.read(peer, [])
    assert transfer.completed
    assert (await soon(transfer.wait())).transport == "none"


async def test_bounds_are_those_of_both_regions(world: World) -> None:
    peer = await soon(world.reader.add_peer(await world.start_target(1)))
    for run in (Run(1, 0, SIZE), Run(0, 1, SIZE)):
        with pytest.raises(TransportError, match="leaves the"):
            world.reader.read(peer, [run])
    assert world.reader.stats().transfers_open == 0


async def test_bad_metadata_says_what_is_wrong(world: World) -> None:
    good = await world.start_target(1)
    kind = world.reader.name
    theirs = Metadata.unpack(good, kind)
    magic, version, _, body, crc = msgpack.unpackb(good)
    bad = {
        "not the metadata": [b"", b"\xc1garbage", b"\x00" * 300, good[:-1], good + b"\x00"],
        "of version 3": [msgpack.packb([magic, version + 1, kind, body, crc])],
        "transport is rdma": [theirs.pack("rdma")],
        "damaged": [msgpack.packb([magic, version, kind, body[:-1] + b"?", crc])],
        "length must be int": [replace(theirs, length="8").pack(kind)],  # type: ignore[arg-type]
    }
    for match, many in bad.items():
        for metadata in many:
            with pytest.raises(TransportError, match=match):
                await soon(world.reader.add_peer(metadata))
    assert world.reader.stats().peers == 0


@pytest.mark.parametrize("body", [b"", b"\xc1", b"\x92\x01", b"\x81\xa1\xff\x01", b"\x81\x90\x01"])
def test_metadata_with_a_body_that_is_not_msgpack_is_a_transport_error(body: bytes) -> None:
    packed = msgpack.packb(["baton-kv", METADATA_VERSION, "tcp", body, zlib.crc32(body)])
    with pytest.raises(TransportError, match="cannot be read"):
        Metadata.unpack(packed, "tcp")


async def test_the_same_metadata_gives_the_same_peer(world: World) -> None:
    metadata = await world.start_target(1)
    adds = (world.reader.add_peer(metadata) for _ in range(3))
    first, second, third = await soon(asyncio.gather(*adds))
    assert first is second is third
    assert world.reader.stats().peers == 1


async def test_a_peer_killed_while_idle_is_lost(world: World) -> None:
    metadata = await world.start_target(1)
    peer = await soon(world.reader.add_peer(metadata))
    await soon(world.reader.read(peer, WHOLE).wait())
    world.kill_target()
    with pytest.raises(PeerLost, match="prefill"):
        await soon(world.reader.read(peer, WHOLE).wait())
    with pytest.raises(PeerLost):
        await soon(world.reader.read(peer, WHOLE).wait())
    await soon(world.reader.remove_peer(peer))
    world.reader.check()


async def test_a_peer_killed_while_read_completes_every_transfer(world: World) -> None:
    peer = await soon(world.reader.add_peer(await world.start_target(1)))
    await soon(world.reader.read(peer, WHOLE).wait())
    transfers = [world.reader.read(peer, WHOLE) for _ in range(200)]
    world.kill_target()
    outcomes = await soon(
        asyncio.gather(*(transfer.wait() for transfer in transfers), return_exceptions=True)
    )
    assert all(transfer.completed for transfer in transfers)
    failed = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    assert failed
    assert all(isinstance(error, PeerLost) for error in failed), failed
    assert world.reader.stats().transfers_open == 0
    with pytest.raises(PeerLost):
        await soon(world.reader.read(peer, WHOLE).wait())


async def test_a_new_incarnation_replaces_the_old_one(world: World) -> None:
    stale = await world.start_target(1)
    old = await soon(world.reader.add_peer(stale))
    world.kill_target()
    new = await soon(world.reader.add_peer(await world.start_target(2)))
    assert (new.owner, new.incarnation != old.incarnation) == ("prefill", True)
    with pytest.raises(PeerLost):
        await soon(world.reader.read(old, WHOLE).wait())
    await soon(world.reader.read(new, WHOLE).wait())
    assert (world.memory == pattern(2)).all()
    with pytest.raises(TransportError, match="replaced by a newer one"):
        await soon(world.reader.add_peer(stale))
    assert world.reader.stats().peers == 1
    await soon(world.reader.remove_peer(old))
    await soon(world.reader.read(new, WHOLE).wait())


async def test_a_removed_peer_can_come_back(world: World) -> None:
    metadata = await world.start_target(1)
    first = await soon(world.reader.add_peer(metadata))
    await soon(world.reader.remove_peer(first))
    world.reader.check()
    with pytest.raises(PeerLost):
        await soon(world.reader.read(first, WHOLE).wait())
    second = await soon(world.reader.add_peer(metadata))
    await soon(world.reader.read(second, WHOLE).wait())
    assert (world.memory == pattern(1)).all()


async def test_removal_is_a_fence(world: World) -> None:
    metadata = await world.start_target(1)
    peer = await soon(world.reader.add_peer(metadata))
    transfers = [world.reader.read(peer, WHOLE) for _ in range(50)]
    await soon(world.reader.remove_peer(peer))
    assert all(transfer.completed for transfer in transfers)
    world.memory[:] = 0
    world.reader.check()
    again = await soon(world.reader.add_peer(metadata))
    await soon(world.reader.read(again, [Run(0, 0, 8)]).wait())
    assert not world.memory[8:].any(), "bytes of a fenced read arrived after the fence"


async def test_close_completes_what_is_open(world: World) -> None:
    peer = await soon(world.reader.add_peer(await world.start_target(1)))
    transfers = [world.reader.read(peer, WHOLE) for _ in range(50)]
    await soon(world.reader.close())
    assert all(transfer.completed for transfer in transfers)
    for transfer in transfers:
        with contextlib.suppress(PeerLost):
            await soon(transfer.wait())
    with pytest.raises(TransportError, match="closed"):
        world.reader.read(peer, WHOLE)
    with pytest.raises(TransportError, match="closed"):
        await world.reader.add_peer(b"")
    await soon(world.reader.remove_peer(peer))
    await soon(world.reader.close())


async def test_a_waiter_that_is_cancelled_leaves_the_transfer(world: World) -> None:
    peer = await soon(world.reader.add_peer(await world.start_target(1)))
    transfer = world.reader.read(peer, WHOLE)
    waiter = asyncio.create_task(transfer.wait())
    await asyncio.sleep(0)
    waiter.cancel()
    with contextlib.suppress(asyncio.CancelledError):  # unless the read was quicker
        await waiter
    await soon(transfer.wait())
    assert (world.memory == pattern(1)).all()


async def test_many_runs_in_many_parts_complete_once(world: World) -> None:
    """More runs than one system call takes, and some longer than a part."""
    peer = await soon(world.reader.add_peer(await world.start_target(1)))
    small = [Run(4096 * i, 4096 * (i ^ 1), 4096) for i in range(1100)]
    whole = Run(1100 * 4096, 1100 * 4096, SIZE - 1100 * 4096)
    report = await soon(world.reader.read(peer, [*small, whole]).wait())
    source, want = pattern(1), pattern(1)
    for run in small:
        piece = source[run.remote_offset : run.remote_offset + 4096]
        want[run.local_offset : run.local_offset + 4096] = piece
    assert report.bytes == SIZE
    assert (world.memory == want).all()
    assert world.reader.stats().transfers_done == 1


async def test_hashes_are_of_what_was_written(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the transport hashes at all, part by part; elsewhere there are none."""
    monkeypatch.setattr(backend, "MAX_BYTES", 8 * PIECE)
    peer = await soon(world.reader.add_peer(await world.start_target(1)))
    runs = scattered(20)
    units = in_units(runs, 3)
    transfer = world.reader.read(peer, runs, lambda: units)
    await soon(transfer.wait())
    source, want = pattern(1), np.zeros(SIZE, np.uint8)
    for run in runs:
        piece = source[run.remote_offset :][: run.length]
        want[run.local_offset :][: run.length] = piece
    assert (world.memory == want).all()
    hashed = world.carrier == "shm" and is_native()
    assert (transfer.hashes is not None) == hashed
    if hashed:
        written = units.pieces._replace(offsets=units.into)
        expected = hash_units(units.key, world.memory.data, written, units.labels)
        assert np.array_equal(transfer.hashes, expected)


async def test_a_peer_that_hangs_is_fenced(process_world: ProcessWorld) -> None:
    world = process_world
    peer = await soon(world.reader.add_peer(await world.start_target(1)))
    await soon(world.reader.read(peer, [Run(0, 0, 8)]).wait())
    os.kill(world.target.pid, signal.SIGSTOP)
    transfers = [world.reader.read(peer, WHOLE) for _ in range(4)]
    await soon(world.reader.remove_peer(peer))
    assert all(transfer.completed for transfer in transfers)
    world.memory[:] = 0
    os.kill(world.target.pid, signal.SIGCONT)
    again = await soon(world.reader.add_peer(await world.start_target(2)))
    await soon(world.reader.read(again, [Run(0, 0, 8)]).wait())
    assert not world.memory[8:].any(), "bytes of a fenced read arrived after the fence"


async def test_the_owner_may_go_while_it_is_read(process_world: ProcessWorld) -> None:
    """An owner that closes in good order waits for nobody, and its memory is read no more."""
    world = process_world
    peer = await soon(world.reader.add_peer(await world.start_target(1)))
    transfers = [world.reader.read(peer, WHOLE) for _ in range(200)]
    await world.end_target()
    with contextlib.suppress(PeerLost):
        await soon(asyncio.gather(*(transfer.wait() for transfer in transfers)))
    with pytest.raises(PeerLost):
        await soon(world.reader.read(peer, WHOLE).wait())
