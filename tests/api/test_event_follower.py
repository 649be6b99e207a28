"""A gateway hears of caches and loads; whatever goes wrong with that only makes it blind."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from baton.api import event_follower
from baton.api.event_follower import EventFollower
from baton.core.hashing import chain_hashes, prefix_root
from baton.core.ids import Incarnation, InstanceId
from baton.core.instance_events import KEY_BYTES, BlockChanges, CacheTerms, InstanceLoad
from baton.core.topology import InstanceInfo, Membership, MembershipBoard, Role
from baton.proto.events_service import add_events_service
from baton.proto.grpc_runtime import WorkerServer
from baton.router.load import key_of
from baton.router.state import RouterState

PROMPT = tuple(range(100))
KEYS = b"".join(h[:KEY_BYTES] for h in chain_hashes(PROMPT[:96], 16, prefix_root("")))
BEGIN = BlockChanges(0, 0, 0, True, KEYS[: 2 * KEY_BYTES], b"")
SOON = 30.0


class Source:
    """An instance that tells what the test has put into its queue; None ends the stream."""

    def __init__(self, terms: CacheTerms) -> None:
        self.incarnation = Incarnation(7)
        self.terms = terms
        self.streams = 0
        self.told: asyncio.Queue[Sequence[BlockChanges] | None] = asyncio.Queue()

    async def follow(self) -> AsyncIterator[tuple[InstanceLoad, Sequence[BlockChanges]]]:
        self.streams += 1
        while (changes := await self.told.get()) is not None:
            yield InstanceLoad(queued_tokens=5), changes

    def tell(self, *changes: BlockChanges) -> None:
        self.told.put_nowait(changes)


class World:
    """One instance, what a router knows of it, and who listens."""

    def __init__(self, source: Source, info: InstanceInfo) -> None:
        self.source = source
        self.board = MembershipBoard(Membership(1, (info,)))
        self.state = RouterState(1000)
        self._row = self.state.row(key_of(info))

    async def knows(self, tokens: int) -> None:
        await self.until(lambda: self.state.known_tokens(PROMPT, "")[self._row] == tokens)

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(SOON):
            while not holds():  # noqa: ASYNC110 (the other side is not ours to wake us)
                await asyncio.sleep(0.005)


@asynccontextmanager
async def followed(
    monkeypatch: pytest.MonkeyPatch, block_size: int = 16, incarnation: int = 7
) -> AsyncIterator[World]:
    monkeypatch.setattr(event_follower, "_FIRST_PAUSE_S", 0.01)
    source = Source(CacheTerms(block_size, "xxh3_128", local_prefill=False))

    def register(server: Any) -> None:
        add_events_service(server, source)

    server = await WorkerServer.start("127.0.0.1", 0, register)
    info = InstanceInfo(
        instance_id=InstanceId("prefill-0"),
        role=Role.PREFILL,
        address=server.address,
        incarnation=Incarnation(incarnation),
        pid=1,
        model="m",
        compatibility="same",
        max_model_len=1000,
        kv_tokens=1000,
        max_sequences=8,
        load_s=0.0,
    )
    world = World(source, info)
    task = asyncio.create_task(EventFollower(world.board, world.state).run())
    try:
        yield world
        assert not task.done(), "it has crashed"
    finally:
        task.cancel()
        await asyncio.wait({task})
        await server.close(0)
        world.state.check()


async def test_it_hears_what_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    async with followed(monkeypatch) as world:
        world.source.tell(BEGIN)
        await world.knows(32)
        world.source.tell(BlockChanges(0, 0, 1, False, KEYS[16:24], b""))
        await world.knows(48)
        world.source.tell(BlockChanges(0, 1, 1, False, b"", KEYS[8:16]))
        await world.knows(16)
        world.board.publish(Membership(2, ()))
        await world.knows(0)


async def test_after_a_gap_it_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    async with followed(monkeypatch) as world:
        world.source.tell(BEGIN)
        await world.knows(32)
        world.source.tell(BlockChanges(0, 9, 1, False, KEYS[16:24], b""))  # 0 to 8 are missing
        await world.knows(0)
        await world.until(lambda: world.source.streams == 2)
        for _ in range(2):  # the stream that was given up may take the first
            world.source.tell(BEGIN)
        await world.knows(32)


async def test_a_stream_that_ends_is_opened_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async with followed(monkeypatch) as world:
        for streams in (1, 2, 3):
            await world.until(lambda streams=streams: world.source.streams == streams)
            world.source.tell(BEGIN)
            await world.knows(32)
            world.source.told.put_nowait(None)
            await world.knows(0)
        await world.until(lambda: world.state.index.stats().retired == 0)  # swept out


@pytest.mark.parametrize("wrong", [{"block_size": 1 << 20}, {"incarnation": 8}])
async def test_who_makes_no_sense_is_not_believed(
    monkeypatch: pytest.MonkeyPatch, wrong: dict[str, int]
) -> None:
    async with followed(monkeypatch, **wrong) as world:
        refused = 0

        async def again(self: EventFollower, instance: InstanceInfo) -> bool:
            nonlocal refused
            heard = await hear(self, instance)
            assert not heard
            refused += 1
            return heard

        hear = EventFollower._hear_all
        monkeypatch.setattr(EventFollower, "_hear_all", again)
        world.source.tell(BEGIN)
        world.source.tell(BEGIN)
        await world.until(lambda: refused >= 1)
        assert world.state.index.stats().holders == 0
