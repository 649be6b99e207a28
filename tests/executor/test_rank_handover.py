"""A rank's reads through staging: pages come back, late or at once, whatever ends the read."""

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from baton.core.config import WorkerConfig
from baton.core.errors import DeadlineExceeded, PeerLost, TransportError, WrongKV
from baton.core.handover import BlockRef, OfferedBlock
from baton.core.ids import BlockId, Epoch, Incarnation, Ticket
from baton.core.kv_layout import KVLayout
from baton.core.sharded_layout import Rank, ShardedLayout
from baton.core.topology import Role
from baton.executor import rank_handover
from baton.executor.handover_memory import HandoverMemory
from baton.executor.handover_orders import DigestOrder, HandoverTerms, ReadOrder
from baton.executor.kv_cache import KVCache
from baton.executor.rank_handover import KVPlace, RankHandover
from baton.kv_transfer.grants import Grants
from baton.kv_transfer.loopback import LoopbackNetwork, LoopbackTransport
from baton.kv_transfer.plan import TokenRange
from baton.kv_transfer.transport import Region, Transfer

SOON = 30.0
TOKENS = 70
PROMPT = tuple(range(TOKENS))
THEIRS = (3, 0, 4, 1, 2)
OURS = (6, 2, 5)
LAYOUT = KVLayout(layers=4, kv_heads=2, block_size=32, head_dim=16, dtype="float32")
WAIT_S = 0.2


class Reader:
    """Decode's only rank: its memory, with two pages for the bfloat16 of 32 tokens each."""

    def __init__(self) -> None:
        config = WorkerConfig(
            instance_id="decode-0", role=Role.DECODE, model_dir=Path(), model_name="none"
        )
        self.network = LoopbackNetwork()
        self.memory = HandoverMemory(config, LAYOUT, 8)
        self.transport = LoopbackTransport(
            self.memory.region,
            owner="decode-0",
            incarnation=Incarnation(1),
            network=self.network,
        )

    async def close(self) -> None:
        await self.transport.close()
        self.transport.check()
        assert self.memory.staging is not None
        self.memory.staging.pool.check(idle=True)
        self.memory.close()


class World:
    """A reader, and the memory of a peer that has a prompt's KV in blocks of 16."""

    def __init__(self, reader: Reader, *, dtype: str = "bfloat16", tp: int = 1) -> None:
        self.reader, self.transport, self.memory = reader, reader.transport, reader.memory
        theirs = ShardedLayout(replace(LAYOUT, dtype=dtype, block_size=16), tp)
        self.source = KVCache(theirs.model, 6)
        self.source.tensor.copy_(torch.randn(self.source.tensor.shape))
        self.parts = {rank: self._part(theirs, rank) for rank in theirs.ranks}
        self.peers = {
            rank: LoopbackTransport(
                Region(part.address, part.nbytes, part),
                owner=f"prefill-{dtype}-{tp}-{rank.tp}",
                incarnation=Incarnation(3),
                network=reader.network,
            )
            for rank, part in self.parts.items()
        }
        ticket = Ticket(b"t" * 16)
        terms = HandoverTerms(theirs, ShardedLayout(LAYOUT), "same", ticket, PROMPT)
        self.handover = RankHandover(
            terms, KVPlace(Rank(), 0, 8, copy=False), self.transport, self.memory, WAIT_S
        )
        refs = [BlockRef(BlockId(block), Epoch(0)) for block in THEIRS]
        layers, key = LAYOUT.all_layers, terms.digests()
        by_rank = [key.offered(r, layers, 0, refs, p.memory) for r, p in self.parts.items()]
        digests = (b"".join(ranks) for ranks in zip(*by_rank, strict=True))
        offered = tuple(OfferedBlock(r, d) for r, d in zip(refs, digests, strict=True))
        blocks = tuple(BlockId(block) for block in OURS)
        self.order = ReadOrder(layers, TokenRange(0, TOKENS), offered, blocks)

    def _part(self, theirs: ShardedLayout, rank: Rank) -> KVCache:
        """Return what a rank of the peer has of the KV."""
        shard = theirs.shard(rank)
        part = KVCache(shard.layout, 6)
        part.tensor.copy_(self.source.tensor[:, :, :, shard.heads.start : shard.heads.end])
        return part

    @property
    def pages(self) -> Any:
        assert self.memory.staging is not None
        return self.memory.staging.pool

    async def connect(self) -> None:
        await self.handover.connect([peer.metadata() for peer in self.peers.values()], 6)

    def converted(self) -> torch.Tensor:
        """What must be in decode's blocks [tokens, layers, parts, heads, dims]."""
        return by_token(self.source.tensor[list(THEIRS)]).to(torch.float32)

    def found(self) -> torch.Tensor:
        return by_token(self.memory.kv.tensor[list(OURS)])


def by_token(blocks: torch.Tensor) -> torch.Tensor:
    return blocks.movedim(4, 1).flatten(0, 1)[:TOKENS]


async def until(holds: Callable[[], Any]) -> None:
    """Let the other tasks run until something holds."""
    async with asyncio.timeout(SOON):
        while not holds():  # noqa: ASYNC110 (there is no event for it)
            await asyncio.sleep(0)


@pytest.fixture
async def reader(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Reader]:
    monkeypatch.setattr(
        "baton.executor.handover_memory._pages",
        lambda config, layout, on_device: (layout.block_bytes // 2, 2),
    )
    reader = Reader()
    yield reader
    await reader.close()


@pytest.fixture
async def world(reader: Reader) -> World:
    world = World(reader)
    await world.connect()
    return world


async def test_an_offer_goes_through_staging_a_page_at_a_time(world: World) -> None:
    report = await world.handover.read(world.order)
    assert world.found().equal(world.converted())
    assert (report.bytes, report.transport) == (5 * world.source.layout.block_bytes, "loopback")
    assert world.transport.stats().transfers_done == 3
    assert "prefill-bfloat16-1-0" in repr(world.handover)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
async def test_one_attempt_reads_from_several_ranks(reader: Reader, dtype: str) -> None:
    two = World(reader, dtype=dtype, tp=2)
    await two.connect()
    report = await two.handover.read(two.order)
    assert two.found().equal(two.converted())
    assert report.bytes == 5 * two.source.layout.block_bytes
    assert two.transport.stats().transfers_done == (6 if dtype == "bfloat16" else 2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
async def test_a_read_ends_only_when_all_ranks_have_been_heard_of(
    reader: Reader, dtype: str
) -> None:
    two = World(reader, dtype=dtype, tp=2)
    await two.connect()
    await two.peers[Rank(tp=1)].close()
    with pytest.raises(PeerLost):
        await two.handover.read(two.order)
    assert two.transport.stats().transfers_open == 0


async def test_the_reads_before_one_that_cannot_be_posted_are_waited_for(
    reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = World(reader, tp=2)
    await two.connect()
    read, calls = two.transport.read, itertools.count()

    def refuse_the_second(*arguments: Any) -> Transfer:
        if next(calls) == 1:
            raise TransportError("no more")
        transfer: Transfer = read(*arguments)
        return transfer

    monkeypatch.setattr(two.transport, "read", refuse_the_second)
    with pytest.raises(TransportError, match="no more"):
        await two.handover.read(two.order)
    assert two.transport.stats().transfers_done == 1
    assert two.pages.stats().free == 2


async def test_what_is_not_what_was_offered_never_reaches_the_pool(world: World) -> None:
    world.parts[Rank()].tensor[THEIRS[3]] += 1  # from token 48 on, in the second piece
    with pytest.raises(WrongKV, match="from token 48 on"):
        await world.handover.read(world.order)
    assert world.found()[:32].equal(world.converted()[:32])
    assert not world.found()[32:].any()


async def test_a_lost_peer_gives_its_page_back(world: World) -> None:
    world.transport.hold()
    reading = asyncio.create_task(world.handover.read(world.order))
    await until(lambda: world.transport.stats().transfers_open)
    assert world.pages.stats().free == 1
    await world.handover.drop()
    with pytest.raises(PeerLost):
        await reading
    assert world.pages.stats().free == 2


async def test_a_reader_that_is_cancelled_keeps_its_page_until_nothing_can_write_it(
    world: World,
) -> None:
    world.transport.hold()
    reading = asyncio.create_task(world.handover.read(world.order))
    await until(lambda: world.transport.stats().transfers_open)
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    assert world.pages.stats().free == 1
    await world.handover.fence()
    assert world.pages.stats().free == 2


async def test_a_reader_that_is_cancelled_while_it_converts_keeps_its_page_until_that_is_done(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    staging = world.memory.staging
    assert staging is not None
    loop, begun = asyncio.get_running_loop(), asyncio.Event()
    go_on = asyncio.Event()
    deposit = staging.deposit

    def slow(*arguments: Any) -> None:
        loop.call_soon_threadsafe(begun.set)
        asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result(SOON)
        deposit(*arguments)

    monkeypatch.setattr(staging, "deposit", slow)
    reading = asyncio.create_task(world.handover.read(world.order))
    async with asyncio.timeout(SOON):
        await begun.wait()
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        assert world.pages.stats().free == 1
        go_on.set()
        await world.handover.fence()
    assert world.pages.stats().free == 2
    assert world.found()[:32].equal(world.converted()[:32])


async def test_a_read_does_not_wait_for_a_page_for_ever(world: World) -> None:
    held = world.pages.claim(2, lambda _: None)
    with pytest.raises(DeadlineExceeded, match="staging memory"):
        await world.handover.read(world.order)
    waiting = asyncio.create_task(world.handover.read(world.order))
    await until(lambda: world.pages.stats().waiting)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert world.pages.stats().waiting == 0
    world.pages.give_back(held)


async def test_without_a_peer_there_is_nothing_to_fence(reader: Reader) -> None:
    alone = World(reader)
    await alone.handover.drop()
    await alone.handover.fence()


class Granting(LoopbackTransport):
    """One that lets only those read who have a ticket, as tcp does."""

    def __init__(self, region: Region, network: LoopbackNetwork) -> None:
        super().__init__(region, owner="prefill-9", incarnation=Incarnation(9), network=network)
        self._grants = Grants()


async def test_a_thread_hashes_what_is_else_hashed_at_once(
    reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    terms = HandoverTerms(
        ShardedLayout(LAYOUT), ShardedLayout(LAYOUT), "same", Ticket(b"t" * 16), PROMPT
    )
    place = KVPlace(Rank(), 0, 8, copy=False)
    transport = Granting(reader.memory.region, reader.network)
    handover = RankHandover(terms, place, transport, reader.memory, WAIT_S)
    refs = tuple(BlockRef(BlockId(block), Epoch(0)) for block in (3, 1))
    order = DigestOrder(LAYOUT.all_layers, 0, refs, ())
    hashed_in = []
    take = handover._digest

    def watched(order: DigestOrder) -> list[bytes]:
        hashed_in.append(threading.current_thread())
        return take(order)

    monkeypatch.setattr(handover, "_digest", watched)
    at_once = await handover.digest(order)
    monkeypatch.setattr(rank_handover, "_QUICK_BYTES", 0)
    assert await handover.digest(order) == at_once
    assert len(set(at_once)) == len(refs)
    assert [t is threading.main_thread() for t in hashed_in] == [True, False]
    await handover.fence()


async def test_a_ticket_opens_nothing_once_its_attempt_is_over_even_if_a_thread_was_at_its_digests(
    reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    terms = HandoverTerms(
        ShardedLayout(LAYOUT), ShardedLayout(LAYOUT), "same", Ticket(b"t" * 16), PROMPT
    )
    transport = Granting(reader.memory.region, reader.network)
    place = KVPlace(Rank(), 0, 8, copy=False)
    handover = RankHandover(terms, place, transport, reader.memory, WAIT_S)
    order = DigestOrder(LAYOUT.all_layers, 0, (BlockRef(BlockId(3), Epoch(0)),), ())
    hashing, go_on = threading.Event(), threading.Event()
    take = handover._digest

    def slow(order: DigestOrder) -> list[bytes]:
        hashing.set()
        assert go_on.wait(SOON)
        return take(order)

    monkeypatch.setattr(handover, "_digest", slow)
    monkeypatch.setattr(rank_handover, "_QUICK_BYTES", 0)
    caller = asyncio.create_task(handover.digest(order))
    await asyncio.to_thread(hashing.wait, SOON)
    caller.cancel()
    fence = asyncio.create_task(handover.fence())
    await until(lambda: handover._fenced)
    assert not fence.done()
    go_on.set()
    await fence
    assert await handover.digest(order) == []
    await transport.close()
    transport.check()


async def test_as_many_ranks_must_be_readable_as_there_are(reader: Reader) -> None:
    two = World(reader, tp=2)
    with pytest.raises(TransportError, match="1 ways to read 2 ranks"):
        await two.handover.connect([b"metadata"], 6)


def test_a_rank_has_the_blocks_of_its_place_and_a_copy_offers_none() -> None:
    place = KVPlace(Rank(), place=1, blocks=8, copy=False)
    assert [place.has(BlockId(block)) for block in (7, 8, 15, 16)] == [False, True, True, False]
    copy = replace(place, copy=True)
    assert copy.has(BlockId(8))
    assert not copy.offers(BlockId(8))
