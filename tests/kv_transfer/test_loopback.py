"""The faults that the loopback transport makes on demand."""

import asyncio
from collections.abc import AsyncIterator

import numpy as np
import pytest

from baton.core.errors import PeerLost, TransportError
from baton.core.ids import new_incarnation
from baton.kv_transfer.faults import SILENT, Fault, FaultPlan
from baton.kv_transfer.loopback import LoopbackNetwork, LoopbackTransport
from baton.kv_transfer.transport import Peer, Run

from .transport_worlds import region_of, soon

SIZE = 1 << 16
HALF = SIZE // 2
HALVES = [Run(0, HALF, HALF), Run(HALF, 0, HALF)]


class Pair:
    """A reader with a plan, and what it reads."""

    def __init__(self) -> None:
        self.network = LoopbackNetwork()
        self.memory = np.zeros(SIZE, np.uint8)
        self.source = np.random.default_rng(0).integers(1, 256, SIZE, dtype=np.uint8)
        self.target = LoopbackTransport(
            region_of(self.source),
            owner="prefill",
            incarnation=new_incarnation(),
            network=self.network,
        )

    async def open(self, plan: FaultPlan) -> tuple[LoopbackTransport, Peer]:
        self.reader = LoopbackTransport(
            region_of(self.memory),
            owner="decode",
            incarnation=new_incarnation(),
            network=self.network,
            plan=plan,
        )
        return self.reader, await self.reader.add_peer(self.target.metadata())

    @property
    def want(self) -> "np.ndarray[tuple[int], np.dtype[np.uint8]]":
        return np.concatenate([self.source[HALF:], self.source[:HALF]])


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    pair = Pair()
    yield pair
    await pair.reader.close()
    pair.reader.check()


async def test_holds_reads_until_released(pair: Pair) -> None:
    reader, peer = await pair.open(FaultPlan())
    reader.hold()
    transfer = reader.read(peer, HALVES)
    await asyncio.sleep(0)
    assert (transfer.completed, reader.stats().transfers_open) == (False, 1)
    assert not pair.memory.any()
    reader.release()
    assert transfer.completed
    assert (pair.memory == pair.want).all()


async def test_a_failure_copies_nothing_and_the_next_read_is_well(pair: Pair) -> None:
    reader, peer = await pair.open(FaultPlan((Fault.FAIL,)))
    with pytest.raises(TransportError, match="as planned"):
        await soon(reader.read(peer, HALVES).wait())
    assert not pair.memory.any()
    await soon(reader.read(peer, HALVES).wait())
    assert (pair.memory == pair.want).all()
    assert reader.faults == {Fault.FAIL: 1}


async def test_one_bit_is_flipped(pair: Pair) -> None:
    reader, peer = await pair.open(FaultPlan((Fault.FLIPPED,)))
    await soon(reader.read(peer, HALVES).wait())
    wrong = np.bitwise_xor(pair.memory, pair.want)
    assert np.unpackbits(wrong).sum() == 1


async def test_what_is_truncated_is_reported_as_whole(pair: Pair) -> None:
    reader, peer = await pair.open(FaultPlan((Fault.TRUNCATED,)))
    report = await soon(reader.read(peer, HALVES).wait())
    assert report.bytes == SIZE
    for run in HALVES:
        middle, end = run.local_offset + run.length // 2, run.local_offset + run.length
        assert (
            pair.memory[run.local_offset : middle] == pair.want[run.local_offset : middle]
        ).all()
        assert not pair.memory[middle:end].any()


@pytest.mark.parametrize("fault", [Fault.LATE, Fault.TWICE])
async def test_what_comes_late_is_what_then_lies_there(pair: Pair, fault: Fault) -> None:
    reader, peer = await pair.open(FaultPlan((fault,)))
    transfer = reader.read(peer, HALVES)
    await asyncio.sleep(0)
    assert not transfer.completed
    assert pair.memory.any() == (fault is Fault.TWICE)
    pair.source[:] = 7
    await soon(transfer.wait())
    assert (pair.memory == 7).all()


async def test_a_later_read_overtakes(pair: Pair) -> None:
    reader, peer = await pair.open(FaultPlan((Fault.OUT_OF_ORDER,)))
    first, second = (reader.read(peer, [run]) for run in HALVES)
    ended: list[str] = []
    first.then(lambda _: ended.append("first"))
    second.then(lambda _: ended.append("second"))
    await soon(asyncio.gather(first.wait(), second.wait()))
    assert ended == ["second", "first"]
    assert (pair.memory == pair.want).all()


async def test_what_hangs_ends_when_the_peer_is_removed(pair: Pair) -> None:
    reader, peer = await pair.open(FaultPlan((Fault.HANG,)))
    transfer = reader.read(peer, HALVES)
    await soon(reader.read(peer, []).wait())
    for _ in range(100):
        await asyncio.sleep(0)
    assert not transfer.completed
    await reader.remove_peer(peer)
    with pytest.raises(PeerLost, match="removed"):
        await soon(transfer.wait())
    assert not pair.memory.any()


async def test_a_peer_dies_in_the_middle(pair: Pair) -> None:
    reader, peer = await pair.open(FaultPlan((Fault.DIE,)))
    with pytest.raises(PeerLost, match="gone"):
        await soon(reader.read(peer, HALVES).wait())
    assert (pair.memory[:HALF] == pair.want[:HALF]).all()
    assert not pair.memory[HALF:].any()
    with pytest.raises(PeerLost):
        await soon(reader.read(peer, HALVES).wait())


def test_a_plan_repeats_by_its_seed() -> None:
    rates = dict.fromkeys(Fault, 0.1)
    drawn = [FaultPlan(rates=rates, seed=3).fault(i) for i in range(400)]
    assert drawn == [FaultPlan(rates=rates, seed=3).fault(i) for i in range(400)]
    assert drawn != [FaultPlan(rates=rates, seed=4).fault(i) for i in range(400)]
    assert set(drawn) == {None, *Fault}
    assert set(Fault) > SILENT


def test_a_plan_begins_with_its_script() -> None:
    plan = FaultPlan((None, Fault.LATE), {Fault.DIE: 1.0})
    assert [plan.fault(i) for i in range(4)] == [None, Fault.LATE, Fault.DIE, Fault.DIE]


@pytest.mark.parametrize("rates", [{Fault.DIE: 0.6, Fault.LATE: 0.6}, {Fault.DIE: -0.1}])
def test_rates_are_shares(rates: dict[Fault, float]) -> None:
    with pytest.raises(ValueError, match="allowed: 0 to 1"):
        FaultPlan(rates=rates)
