"""What followers hear: everything first, then what changes; the slow ones everything again."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from baton.core.ids import Incarnation
from baton.core.instance_events import BlockChanges, CacheTerms, InstanceLoad
from baton.engine.kv_events import BlockRemoved, BlockStored, KVEventLog, KVEvents
from baton.executor import event_feed
from baton.executor.event_feed import EventFeed

SOON = 30.0


def name(number: int) -> bytes:
    return number.to_bytes(16, "big").rjust(16, b"\0")[::-1]


def key(number: int) -> bytes:
    return name(number)[:8]


class World:
    """An engine of several partitions, without the engine."""

    def __init__(self, partitions: int = 1) -> None:
        self.moved = asyncio.Event()
        self.has: list[dict[bytes, None]] = [{} for _ in range(partitions)]
        self._logs = [KVEventLog(1000) for _ in range(partitions)]
        self.queued = 0

    def store(self, *numbers: int, partition: int = 0) -> None:
        for number in numbers:
            self.has[partition][name(number)] = None
            self._logs[partition].record(BlockStored(name(number), b""))
        self.moved.set()

    def remove(self, *numbers: int, partition: int = 0) -> None:
        for number in numbers:
            del self.has[partition][name(number)]
            self._logs[partition].record(BlockRemoved(name(number), b""))
        self.moved.set()

    def drain_kv_events(self) -> tuple[KVEvents, ...]:
        pairs = zip(self._logs, self.has, strict=True)
        return tuple(log.drain(lambda h=h: [BlockStored(x, b"") for x in h]) for log, h in pairs)

    def cached_hashes(self) -> tuple[Iterable[bytes], ...]:
        return tuple(self.has)

    def load(self) -> InstanceLoad:
        return InstanceLoad(queued_tokens=self.queued)


class Reader:
    """A gateway: keeps what it is told, and fails at a gap."""

    def __init__(self, feed: EventFeed) -> None:
        self.has: dict[int, set[bytes]] = {}
        self.beginnings = 0
        self.load = InstanceLoad()
        self._next: dict[int, int] = {}
        self._stream = feed.follow()

    async def read(self) -> None:
        async with asyncio.timeout(SOON):
            self.load, changes = await anext(self._stream)
        for change in changes:
            self._take(change)

    async def until(self, holds: Any) -> None:
        while not holds():
            await self.read()

    def _take(self, change: BlockChanges) -> None:
        if change.complete:
            self.has[change.partition] = set()
            self.beginnings += 1
        else:
            assert change.first == self._next[change.partition], "a gap"
        self._next[change.partition] = change.first + change.events
        has = self.has[change.partition]
        stored, removed = (
            {keys[n : n + 8] for n in range(0, len(keys), 8)}
            for keys in (change.stored, change.removed)
        )
        assert not stored & removed
        has -= removed
        has |= stored


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
async def feed(world: World) -> AsyncIterator[EventFeed]:
    async with _running(world) as feed:
        yield feed


@asynccontextmanager
async def _running(world: World, hash_name: str = "xxh3_128") -> AsyncIterator[EventFeed]:
    feed = EventFeed(Incarnation(1), CacheTerms(16, hash_name, False), world)
    task = asyncio.create_task(feed.run())
    yield feed
    feed.close()
    task.cancel()
    await asyncio.wait({task})


async def test_everything_first_then_what_changes(world: World, feed: EventFeed) -> None:
    world.store(1, 2, 3)
    reader = Reader(feed)
    await reader.read()
    assert reader.has == {0: {key(1), key(2), key(3)}}
    world.store(4)
    world.remove(2)
    world.store(2)  # of several events of a block only the last counts
    world.remove(3)
    world.queued = 9
    await reader.until(lambda: reader.has == {0: {key(1), key(2), key(4)}})
    assert reader.beginnings == 1
    assert reader.load.queued_tokens == 9
    late = Reader(feed)
    await late.read()
    assert late.has == reader.has


async def test_large_caches_come_in_portions(
    world: World, feed: EventFeed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_feed, "_PORTION", 10)
    world.store(*range(1, 36))
    reader = Reader(feed)
    for portion in range(1, 5):
        await reader.read()
        assert len(reader.has[0]) == min(35, 10 * portion)
    world.store(*range(100, 125))  # while it reads
    await reader.until(lambda: len(reader.has[0]) == 60)
    assert reader.beginnings == 1


async def test_who_reads_too_slowly_begins_anew(
    world: World, feed: EventFeed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_feed, "_HISTORY", 8)
    slow, quick = Reader(feed), Reader(feed)
    await slow.read()
    await quick.read()
    for number in range(1, 31):
        world.store(number)
        await quick.until(lambda number=number: key(number) in quick.has[0])
    await slow.until(lambda: len(slow.has[0]) == 30)
    assert (slow.beginnings, quick.beginnings) == (2, 1)
    assert feed._kept <= 8


async def test_events_that_the_engine_lost_make_all_begin_anew(
    world: World, feed: EventFeed
) -> None:
    reader = Reader(feed)
    await reader.read()
    world.store(*range(1, 1200))  # its log holds 1000
    world.remove(*range(1, 1100))
    await reader.until(lambda: reader.has.get(0) == {key(n) for n in range(1100, 1200)})
    assert reader.beginnings == 2


async def test_partitions_are_told_apart() -> None:
    world = World(partitions=2)
    async with _running(world) as feed:
        world.store(1, 2)
        reader = Reader(feed)
        await reader.until(lambda: len(reader.has) == 2)
        world.store(2, 3, partition=1)
        await reader.until(lambda: len(reader.has[1]) == 2)
        assert reader.has == {0: {key(1), key(2)}, 1: {key(2), key(3)}}


async def test_without_a_cache_only_the_load_is_told() -> None:
    world = World()
    world.queued = 4
    async with _running(world, hash_name="") as feed:
        reader = Reader(feed)
        await reader.read()
        await reader.read()
        assert (reader.has, reader.load.queued_tokens) == ({}, 4)


async def test_closing_ends_the_streams(world: World, feed: EventFeed) -> None:
    stream = feed.follow()
    await anext(stream)
    waiting = asyncio.create_task(anext(stream))
    await asyncio.sleep(0)
    feed.close()
    done, _ = await asyncio.wait({waiting}, timeout=SOON)
    assert done
    assert isinstance(waiting.exception(), StopAsyncIteration)
