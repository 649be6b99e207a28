"""Reads through staging: pages come back, late or at once, whatever ends the read."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from baton.core.config import EngineConfig, HandoverConfig, WorkerConfig
from baton.core.errors import DeadlineExceeded, PeerLost, TransportError, WrongKV
from baton.core.handover import PROTOCOL_VERSION, BlockRef, Offer, OfferedBlock, Open
from baton.core.ids import (
    Attempt,
    BlockId,
    Epoch,
    Incarnation,
    InstanceId,
    RequestId,
    Ticket,
)
from baton.core.moving_average import MovingAverage
from baton.core.request import GenerateRequest
from baton.core.sharded_layout import Rank, ShardedLayout
from baton.core.topology import Role
from baton.decode_worker.offer_reader import OfferReader
from baton.decode_worker.worker import DecodeWorker
from baton.executor.kv_cache import KVCache
from baton.kv_transfer.digest import DigestKey
from baton.kv_transfer.loopback import LoopbackNetwork, LoopbackTransport
from baton.kv_transfer.plan import TokenRange, plan_between
from baton.kv_transfer.receiver_events import Read
from baton.kv_transfer.transport import Region, Transfer, Transport

SOON = 30.0
TOKENS = 70
PROMPT = tuple(range(TOKENS))
THEIRS = (3, 0, 4, 1, 2)
OURS = (6, 2, 5)


class World:
    """A decode worker, and the memory of a peer that has a prompt's KV in blocks of 16."""

    def __init__(
        self,
        worker: DecodeWorker,
        network: LoopbackNetwork,
        *,
        dtype: str = "bfloat16",
        tp: int = 1,
    ) -> None:
        self.worker, self.network = worker, network
        self.instance = worker.instance
        ours = ShardedLayout(self.instance.layout)
        theirs = ShardedLayout(replace(ours.model, dtype=dtype, block_size=16), tp)
        self.source = KVCache(theirs.model, 6)
        self.source.tensor.copy_(torch.randn(self.source.tensor.shape))
        self.parts = {rank: self._part(theirs, rank) for rank in theirs.ranks}
        self.peers = {
            rank: LoopbackTransport(
                Region(part.address, part.nbytes, part),
                owner=f"prefill-{dtype}-{tp}-{rank.tp}",
                incarnation=Incarnation(3),
                network=network,
            )
            for rank, part in self.parts.items()
        }
        open_ = Open(
            PROTOCOL_VERSION,
            "same",
            ours,
            InstanceId("decode-0"),
            self.instance.incarnation,
            Ticket(b"t" * 16),
            Attempt(0),
            GenerateRequest(RequestId("r"), PROMPT, 2),
        )
        plan = plan_between(theirs, ours)
        self.reader = OfferReader(self.instance, plan, open_, MovingAverage())
        key = DigestKey(plan, compatibility="same", ticket=open_.ticket, prompt=PROMPT)
        refs = [BlockRef(BlockId(block), Epoch(0)) for block in THEIRS]
        layers = theirs.model.all_layers
        by_rank = [key.offered(r, layers, 0, refs, p.memory) for r, p in self.parts.items()]
        digests = (b"".join(ranks) for ranks in zip(*by_rank, strict=True))
        offered = tuple(OfferedBlock(r, d) for r, d in zip(refs, digests, strict=True))
        self.action = Read(
            Offer(Attempt(0), 0, layers, 0, offered),
            tuple(BlockRef(BlockId(block), Epoch(0)) for block in OURS),
            TokenRange(0, TOKENS),
        )

    def _part(self, theirs: ShardedLayout, rank: Rank) -> KVCache:
        """Return what a rank of the peer has of the KV."""
        shard = theirs.shard(rank)
        part = KVCache(shard.layout, 6)
        part.tensor.copy_(self.source.tensor[:, :, :, shard.heads.start : shard.heads.end])
        return part

    @property
    def transport(self) -> Any:
        return self.instance.transport

    @property
    def pages(self) -> Any:
        staging = self.instance.memory.staging
        assert staging is not None
        return staging.pool

    async def connect(self) -> None:
        await self.reader.connect({rank: peer.metadata() for rank, peer in self.peers.items()})

    def converted(self) -> torch.Tensor:
        """What must be in decode's blocks [tokens, layers, parts, heads, dims]."""
        return by_token(self.source.tensor[list(THEIRS)]).to(torch.float32)

    def found(self) -> torch.Tensor:
        return by_token(self.instance.kv.tensor[list(OURS)])


def by_token(blocks: torch.Tensor) -> torch.Tensor:
    return blocks.movedim(4, 1).flatten(0, 1)[:TOKENS]


async def until(holds: Callable[[], Any]) -> None:
    """Let the other tasks run until something holds."""
    async with asyncio.timeout(SOON):
        while not holds():  # noqa: ASYNC110 (there is no event for it)
            await asyncio.sleep(0)


@pytest.fixture
async def world(tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    network = LoopbackNetwork()

    async def loopback(region: Region, config: Any, **who: Any) -> Transport:
        return LoopbackTransport(
            region, owner=who["owner"], incarnation=who["incarnation"], network=network
        )

    # Two pages, each for the bfloat16 of 32 tokens, so that the prompt takes three turns.
    monkeypatch.setattr(
        "baton.executor.handover_memory._pages",
        lambda config, layout, on_device: (layout.block_bytes // 2, 2),
    )
    config = WorkerConfig(
        instance_id="decode-0",
        role=Role.DECODE,
        model_dir=tiny_llama_dir,
        model_name="tiny",
        engine=EngineConfig(kv_memory_mib=8, block_size=32),
        handover=HandoverConfig(read_timeout_s=0.2),
    )
    worker = await DecodeWorker.start(config, on_progress=lambda _: None, open_transport=loopback)
    async with worker:
        world = World(worker, network)
        await world.connect()
        yield world
        world.pages.check(idle=True)


async def test_an_offer_goes_through_staging_a_page_at_a_time(world: World) -> None:
    report = await world.reader.read(world.action)
    assert world.found().equal(world.converted())
    assert (report.bytes, report.transport) == (5 * world.source.layout.block_bytes, "loopback")
    assert world.transport.stats().transfers_done == 3
    assert "prefill-bfloat16-1-0" in repr(world.reader)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
async def test_one_attempt_reads_from_several_ranks(world: World, dtype: str) -> None:
    two = World(world.worker, world.network, dtype=dtype, tp=2)
    await two.connect()
    report = await two.reader.read(two.action)
    assert two.found().equal(two.converted())
    assert report.bytes == 5 * two.source.layout.block_bytes
    assert two.transport.stats().transfers_done == (6 if dtype == "bfloat16" else 2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
async def test_a_read_ends_only_when_all_ranks_have_been_heard_of(world: World, dtype: str) -> None:
    two = World(world.worker, world.network, dtype=dtype, tp=2)
    await two.connect()
    await two.peers[Rank(tp=1)].close()
    with pytest.raises(PeerLost):
        await two.reader.read(two.action)
    assert two.transport.stats().transfers_open == 0


async def test_the_reads_before_one_that_cannot_be_posted_are_waited_for(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = World(world.worker, world.network, tp=2)
    await two.connect()
    read, calls = two.transport.read, itertools.count()

    def refuse_the_second(*arguments: Any) -> Transfer:
        if next(calls) == 1:
            raise TransportError("no more")
        transfer: Transfer = read(*arguments)
        return transfer

    monkeypatch.setattr(two.transport, "read", refuse_the_second)
    with pytest.raises(TransportError, match="no more"):
        await two.reader.read(two.action)
    assert two.transport.stats().transfers_done == 1
    assert two.pages.stats().free == 2


async def test_what_is_not_what_was_offered_never_reaches_the_pool(world: World) -> None:
    world.parts[Rank()].tensor[THEIRS[3]] += 1  # from token 48 on, in the second piece
    with pytest.raises(WrongKV, match="from token 48 on"):
        await world.reader.read(world.action)
    assert world.found()[:32].equal(world.converted()[:32])
    assert not world.found()[32:].any()


async def test_a_lost_peer_gives_its_page_back(world: World) -> None:
    world.transport.hold()
    reading = asyncio.create_task(world.reader.read(world.action))
    await until(lambda: world.transport.stats().transfers_open)
    assert world.pages.stats().free == 1
    await world.reader.drop_peers()
    with pytest.raises(PeerLost):
        await reading
    assert world.pages.stats().free == 2


async def test_a_reader_that_is_cancelled_keeps_its_page_until_nothing_can_write_it(
    world: World,
) -> None:
    world.transport.hold()
    reading = asyncio.create_task(world.reader.read(world.action))
    await until(lambda: world.transport.stats().transfers_open)
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    assert world.pages.stats().free == 1
    await world.reader.fence()
    assert world.pages.stats().free == 2


async def test_a_reader_that_is_cancelled_while_it_converts_keeps_its_page_until_that_is_done(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    staging = world.instance.memory.staging
    assert staging is not None
    loop, begun = asyncio.get_running_loop(), asyncio.Event()
    go_on = asyncio.Event()
    deposit = staging.deposit

    def slow(*arguments: Any) -> None:
        loop.call_soon_threadsafe(begun.set)
        asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result(SOON)
        deposit(*arguments)

    monkeypatch.setattr(staging, "deposit", slow)
    reading = asyncio.create_task(world.reader.read(world.action))
    async with asyncio.timeout(SOON):
        await begun.wait()
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        assert world.pages.stats().free == 1
        go_on.set()
        await world.reader.fence()
    assert world.pages.stats().free == 2
    assert world.found()[:32].equal(world.converted()[:32])


async def test_a_read_does_not_wait_for_a_page_for_ever(world: World) -> None:
    held = world.pages.claim(2, lambda _: None)
    with pytest.raises(DeadlineExceeded, match="staging memory"):
        await world.reader.read(world.action)
    waiting = asyncio.create_task(world.reader.read(world.action))
    await until(lambda: world.pages.stats().waiting)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert world.pages.stats().waiting == 0
    world.pages.give_back(held)


async def test_without_a_peer_there_is_nothing_to_fence(world: World) -> None:
    world.reader._peers.clear()
    await world.reader.drop_peers()
    await world.reader.fence()
