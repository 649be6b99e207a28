"""Each fault does to a read what its name says, and keeps the fence of `Transport`."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from baton.core.errors import PeerLost, TransportError
from baton.core.ids import new_incarnation
from baton.kv_transfer.loopback import LoopbackNetwork, LoopbackTransport
from baton.kv_transfer.transport import Peer, Region, Run

from .armed import Armed
from .faulty_transport import FaultyTransport
from .schedule import IN_READS, WRONG_BYTES, Fault

SIZE = 4096
RUNS = [Run(0, 1024, 512), Run(2048, 0, 512)]


def right_bytes(theirs: np.ndarray[Any, Any], ours: np.ndarray[Any, Any]) -> None:
    for run in RUNS:
        end = run.local_offset + run.length
        ours[run.local_offset : end] = theirs[run.remote_offset : run.remote_offset + run.length]


@dataclass
class Pair:
    theirs: np.ndarray[Any, Any]
    ours: np.ndarray[Any, Any]
    reader: FaultyTransport
    peer: Peer
    network: LoopbackNetwork
    armed: Armed
    told: list[dict[str, object]] = field(default_factory=list)

    def expected(self) -> np.ndarray[Any, Any]:
        """What our memory holds after a good read."""
        expected = self.ours.copy()
        right_bytes(self.theirs, expected)
        return expected

    @property
    def struck(self) -> list[object]:
        return [message["struck"] for message in self.told if "struck" in message]


def region_of(memory: np.ndarray[Any, Any]) -> Region:
    return Region(memory.ctypes.data, memory.nbytes, memory)


@pytest.fixture
async def pair() -> Any:
    network = LoopbackNetwork()
    draw = np.random.default_rng(1)
    theirs, ours = (draw.integers(0, 256, SIZE, dtype=np.uint8) for _ in range(2))
    owner = LoopbackTransport(
        region_of(theirs), owner="prefill", incarnation=new_incarnation(), network=network
    )
    inner = LoopbackTransport(
        region_of(ours), owner="decode", incarnation=new_incarnation(), network=network
    )
    told: list[dict[str, object]] = []
    armed = Armed(told.append)
    reader = FaultyTransport(inner, region_of(ours), armed)
    yield Pair(theirs, ours, reader, await reader.add_peer(owner.metadata()), network, armed, told)
    await reader.close()
    reader.check()
    await owner.close()


def fault(kind: str, count: int = 1) -> Fault:
    return Fault(kind, "read", count, 0, 0.01, 7)


@pytest.mark.parametrize("kind", WRONG_BYTES)
async def test_wrong_bytes_lie_only_where_the_read_was(pair: Pair, kind: str) -> None:
    expected = pair.expected()
    pair.armed.arm([fault(kind)])
    report = await pair.reader.read(pair.peer, RUNS).wait()
    assert report.bytes == 1024
    wrong = np.flatnonzero(pair.ours != expected)
    assert len(wrong) > 0
    assert all(any(r.local_offset <= i < r.local_offset + r.length for r in RUNS) for i in wrong)
    assert pair.struck == [kind]


async def test_old_bytes_that_were_the_new_ones_are_spoiled_all_the_same(pair: Pair) -> None:
    right_bytes(pair.theirs, pair.ours)
    expected = pair.ours.copy()
    pair.armed.arm([fault("stale")])
    await pair.reader.read(pair.peer, RUNS).wait()
    assert (pair.ours != expected).sum() == 1


@pytest.mark.parametrize("kind", ["late", "twice"])
async def test_a_read_may_be_late_or_done_twice_and_right(pair: Pair, kind: str) -> None:
    expected = pair.expected()
    pair.armed.arm([fault(kind)])
    await pair.reader.read(pair.peer, RUNS).wait()
    assert (pair.ours == expected).all()
    assert pair.struck == [kind]


async def test_a_failed_read_writes_nothing(pair: Pair) -> None:
    before = pair.ours.copy()
    pair.armed.arm([fault("fail")])
    with pytest.raises(TransportError):
        await pair.reader.read(pair.peer, RUNS).wait()
    assert (pair.ours == before).all()


async def _remove(pair: Pair) -> None:
    await pair.reader.remove_peer(pair.peer)


async def _close(pair: Pair) -> None:
    await pair.reader.close()


async def _meet_again(pair: Pair) -> None:
    """The owner restarts as another incarnation."""
    pair.network.kill("prefill")
    reborn = LoopbackTransport(
        region_of(pair.theirs),
        owner="prefill",
        incarnation=new_incarnation(),
        network=pair.network,
    )
    await pair.reader.add_peer(reborn.metadata())


@pytest.mark.parametrize("fence", [_remove, _close, _meet_again])
@pytest.mark.parametrize("kind", ["hang", "late"])
async def test_a_fence_ends_what_is_open(
    pair: Pair, kind: str, fence: Callable[[Pair], Any]
) -> None:
    pair.armed.arm([Fault(kind, "read", 1, 0, 1000.0, 7)])
    transfer = pair.reader.read(pair.peer, RUNS)
    await asyncio.sleep(0)
    assert pair.reader.stats().transfers_open == 1
    before = pair.ours.copy()
    await fence(pair)
    after = pair.ours.copy()
    assert (after != before).any(), "bytes may land until the fence"
    with pytest.raises(PeerLost):
        await transfer.wait()
    assert (pair.ours == after).all()


async def test_only_the_read_that_was_named_is_struck(pair: Pair) -> None:
    pair.armed.arm([fault(kind, count=index) for index, kind in enumerate(IN_READS[:2], start=2)])
    expected = pair.expected()
    await pair.reader.read(pair.peer, RUNS).wait()
    assert (pair.ours == expected).all()
    assert pair.struck == []
    for _ in range(2):
        await pair.reader.read(pair.peer, RUNS).wait()
    assert pair.struck == list(IN_READS[:2])
    assert [message for message in pair.told if "event" in message] == [{"event": "read"}] * 3
