"""One rank's part of one attempt of a handover: reads into its own blocks, digests of its own.

The leader decides what is read and when (kv_transfer/receiver.py). Each rank finds out by the
transfer plan what of it is its own, reads that from the source ranks that have it, and verifies it,
on one of two ways:

    in place     transport ─▶ blocks, verified there: in host memory, or from device to device
    staged       transport ─▶ a page of staging, verified there ─▶ blocks; a piece of the offer at
                 a time, so that a page is held no longer than that takes

Whatever ends a read, a page is given back only once nothing can write it any more.
"""

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np

from baton.core.errors import DeadlineExceeded, PeerLost, TransportError, WrongKV
from baton.core.handover import BlockRef, OfferedBlock
from baton.core.ids import BlockId
from baton.core.kv_layout import LayerRange
from baton.core.sharded_layout import Rank
from baton.executor.handover_memory import HandoverMemory
from baton.executor.handover_orders import DigestOrder, HandoverTerms, ReadOrder
from baton.executor.staging import Staging
from baton.kernels.kv_digest import Digests, HashesItself, Memory
from baton.kv_transfer.landing import pieces
from baton.kv_transfer.plan import TokenRange
from baton.kv_transfer.staging_pool import Claim
from baton.kv_transfer.transport import Peer, Transfer, TransferReport, Transport

T = TypeVar("T")

_LONG = 1024
"""Tokens of a prompt from which on its prefixes are hashed in a thread: of fewer, a thread's turn
takes as long."""
_MANY = 256
"""Blocks up to which hashes taken on the way are compared in less than a thread's turn."""

_QUICK_BYTES = 1 << 17
"""Of host memory: they are hashed in less time than a thread takes to begin."""


@dataclass(frozen=True, slots=True)
class KVPlace:
    """Which of the instance's KV a rank has."""

    rank: Rank
    """Its layers and heads, of all sequences at its place."""
    place: int
    """Along dp and ep; see Ranks."""
    blocks: int
    """In its pool."""
    copy: bool
    """Whether another rank along cp, before it, has the same."""

    def has(self, block: BlockId) -> bool:
        """Return whether one of the instance's blocks is in this rank's pool."""
        return block // self.blocks == self.place

    def offers(self, block: BlockId) -> bool:
        """Return whether others read it from this rank."""
        return self.has(block) and not self.copy


class RankHandover:
    """One rank, one attempt. One event loop only; copying, and much hashing, run in threads."""

    def __init__(
        self,
        terms: HandoverTerms,
        place: KVPlace,
        transport: Transport,
        memory: HandoverMemory,
        read_timeout_s: float,
    ) -> None:
        self._plan = terms.plan
        self._turn = self._plan.turn(terms.ticket)
        self._digests = terms.digests()
        self._long = len(terms.prompt) >= _LONG
        self._place = place.rank
        self._kv_place = place
        self._transport = transport
        self._memory = memory
        self._timeout_s = read_timeout_s
        self._sources: Sequence[bytes] = ()
        self._source_blocks = 0
        """In the pool of each source rank."""
        self._peers: dict[Rank, Peer] = {}
        """At the source's place along dp and ep that the prompt's KV is at."""
        self._ticket = terms.ticket
        self._grants = False
        """Whether something was granted to it."""
        self._transfers: set[Transfer] = set()
        self._jobs: set[asyncio.Task[Any]] = set()
        """What threads do for it, which goes on if their caller is cancelled."""
        self._fenced = False

    def __repr__(self) -> str:
        return f"RankHandover({self._place}, from {[str(peer) for peer in self._peers.values()]})"

    async def connect(self, sources: Sequence[bytes], source_blocks: int) -> None:
        """Make the source ranks readable that have something for this one.

        `sources` is how each is read, `source_blocks` how many blocks it has; see Accepted. With
        several places for sequences, the first offer says which it is. Raises TransportError.
        """
        ranks = len(self._plan.source.ranks)
        if not sources or len(sources) % ranks:
            raise TransportError(f"{len(sources)} ways to read {ranks} ranks")
        if source_blocks < 1:
            raise TransportError(f"ranks of {source_blocks} blocks")
        self._sources, self._source_blocks = sources, source_blocks
        # Before there is something to read, rather than when there is.
        if self._long:
            self._in_thread(self._digests.prepare)
        else:
            self._digests.prepare()
        if len(sources) == ranks:
            await self._connect(0)

    async def _connect(self, place: int) -> None:
        """Connect to the ranks at one of the source's places for sequences."""
        source = self._plan.source
        places = len(self._sources) // len(source.ranks)
        if not 0 <= place < places:
            raise TransportError(f"a block at place {place} of {places}")
        for link in self._plan.links(self._place, source.model.all_layers, self._turn):
            rank = link.source
            if rank not in self._peers:
                way = self._sources[(rank.pp * places + place) * source.tp + rank.tp]
                self._peers[rank] = await self._transport.add_peer(way)

    async def read(self, order: ReadOrder) -> TransferReport:
        """Read and verify this rank's part; when this returns, nothing of it is written any more.

        Raises TransportError if it cannot be read, DeadlineExceeded if staging stays full, WrongKV
        if it is not what was offered.
        """
        held = self._plan.target.layers(self._place).within(order.layers)
        if not len(held) or not self._kv_place.has(order.blocks[0]):
            return TransferReport(0, 0.0, "none")
        if not self._peers:
            await self._connect(order.offered[0].ref.block // self._source_blocks)
        order = order.counted_in(self._kv_place.blocks, self._source_blocks)
        try:
            if self._plan.in_place:
                return await self._read_in_place(order)
            staging = self._memory.staging
            assert staging is not None, "a plan with staging, and none there"
            parts = pieces(self._plan, self._place, order.layers, order.tokens, staging.page_bytes)
            reports = [await self._read_staged(order, part, staging) for part in parts]
        except PeerLost:
            await self.drop()
            raise
        total = sum(report.seconds for report in reports)
        return TransferReport(sum(r.bytes for r in reports), total, reports[-1].transport)

    async def drop(self) -> None:
        """Close the peers' endpoints by force, so that reads under way end."""
        for peer in self._peers.values():
            await self._transport.remove_peer(peer)

    async def fence(self) -> None:
        """Return once nothing of this attempt is read or written any more; reads have no caller.

        Nothing is granted to it any more either.
        """
        self._fenced = True
        if any(not transfer.completed for transfer in self._transfers):
            await self.drop()
        ends = (transfer.wait() for transfer in self._transfers)
        await asyncio.gather(*ends, *self._jobs, return_exceptions=True)
        if self._grants:
            self._transport.revoke(self._ticket)

    async def digest(self, order: DigestOrder) -> list[bytes]:
        """Return, for each block, the digests of what this rank has of it; copies it out first.

        Nothing, if the sequence is at another place, or another rank along cp has it too,
        or the attempt is over, so that nobody waits for them.
        """
        if self._fenced or not order.refs or not self._kv_place.offers(order.refs[0].block):
            return []
        own = order.counted_in(self._kv_place.blocks)
        if self._is_quick(own):
            return self._digest(own)
        return await asyncio.shield(self._in_thread(lambda: self._digest(own)))

    def _is_quick(self, order: DigestOrder) -> bool:
        if self._long or order.pages or self._memory.on_device:
            return False
        shard = self._plan.source.shard(self._place)
        layers = shard.layers.within(order.layers).counted_from(shard.layers.start)
        _, size = self._memory.kv.layout.run(BlockId(0), layers)
        return size * len(order.refs) <= _QUICK_BYTES

    def _in_thread(self, work: Callable[[], T]) -> asyncio.Task[T]:
        """Let a thread do it; `fence` waits for it, even if its caller is cancelled."""
        job = asyncio.create_task(asyncio.to_thread(work))
        self._jobs.add(job)
        job.add_done_callback(self._jobs.discard)
        return job

    def _digest(self, order: DigestOrder) -> list[bytes]:
        refs, memory = order.refs, self._memory
        shard = self._plan.source.shard(self._place)
        held = shard.layers.within(order.layers)
        if order.pages and len(held):
            assert memory.staging is not None, "a pool that cannot be read, and no staging"
            own = held.counted_from(shard.layers.start)
            memory.staging.copy_out(refs, own, order.pages)
        if order.pages:
            assert memory.staging is not None, "pages of no staging"
            refs = order.pages
            readable: Memory | HashesItself = memory.staging.memory
        else:
            readable = memory.pool
        first = order.first_block
        digests = self._digests.offered(self._place, order.layers, first, refs, readable)
        self._grant(refs, held.counted_from(shard.layers.start), staged=bool(order.pages))
        return digests

    def _grant(self, refs: Sequence[BlockRef], layers: LayerRange, *, staged: bool) -> None:
        """Let the ticket open `layers` of these blocks, or of the pages that stand for them."""
        layout, memory = self._memory.kv.layout, self._memory
        start, size = layout.run(BlockId(0), layers)
        begins = np.array([ref.block for ref in refs], np.int64) * layout.block_bytes + start
        if staged:
            assert memory.staging is not None, "pages of no staging"
            begins += memory.staging.offset(BlockId(0))
        if size:
            self._grants = True
            self._transport.grant(self._ticket, begins, np.full(len(refs), size, np.int64))

    async def _read_in_place(self, order: ReadOrder) -> TransferReport:
        transfers = self._post(order.layers, order.tokens, order.offered, order.blocks, 0)
        report = await self._done(transfers.values())
        hashes = _on_the_way(transfers)
        what = order.layers, order.tokens, order.offered, order.blocks
        if hashes is None or len(order.offered) > _MANY:
            await asyncio.to_thread(self._verify, *what, self._memory.pool, hashes)
        else:
            self._verify(*what, self._memory.pool, hashes)
        return report

    async def _read_staged(
        self, order: ReadOrder, part: TokenRange, staging: Staging
    ) -> TransferReport:
        offered, blocks = order.part(part, self._plan)
        layers, units = order.layers, range(self._plan.num_units(part))
        claim = await self._claim(staging)
        page = claim.pages[0].block
        transfers: dict[Rank, Transfer] = {}
        job: asyncio.Task[None] | None = None

        def take() -> None:
            hashes = _on_the_way(transfers)
            self._verify(layers, part, offered, units, staging.page(page), hashes)
            staging.deposit(page, self._plan.conversion(self._place, layers, part, blocks))

        try:
            transfers = self._post(layers, part, offered, units, staging.offset(page))
            report = await self._done(transfers.values())
            job = self._in_thread(take)
            await asyncio.shield(job)
            return report
        finally:
            self._give_back(staging, claim, transfers.values(), job)

    def _give_back(
        self,
        staging: Staging,
        claim: Claim,
        transfers: Collection[Transfer],
        job: "asyncio.Task[None] | None",
    ) -> None:
        """Give a page back once nothing writes it any more."""
        writers = sum(not transfer.completed for transfer in transfers)
        writers += job is not None and not job.done()
        if not writers:
            staging.pool.give_back(claim)
            return

        def ended(_: object) -> None:
            nonlocal writers
            writers -= 1
            if not writers:
                staging.pool.give_back(claim)

        for transfer in transfers:
            if not transfer.completed:
                transfer.then(ended)
        if job is not None and not job.done():
            job.add_done_callback(ended)

    async def _claim(self, staging: Staging) -> Claim:
        """Wait for a page of staging."""
        granted = asyncio.Event()
        claim = staging.pool.claim(1, lambda _: granted.set())
        try:
            async with asyncio.timeout(self._timeout_s):
                await granted.wait()
        except BaseException as error:
            staging.pool.give_back(claim)
            if isinstance(error, TimeoutError):
                raise DeadlineExceeded("decode waited too long for staging memory") from None
            raise
        return claim

    def _post(
        self,
        layers: LayerRange,
        tokens: TokenRange,
        offered: Sequence[OfferedBlock],
        landing_blocks: Sequence[int],
        landing_offset: int,
    ) -> dict[Rank, Transfer]:
        """Begin to read from every source rank that has a part; what is refused has failed."""
        runs = self._plan.reads(
            self._place,
            layers,
            tokens,
            [block.ref.block for block in offered],
            landing_blocks,
            landing_offset=landing_offset,
            turn=self._turn,
        )
        posted = {}
        for rank, table in runs.items():
            units = partial(
                self._digests.units_read,
                self._place,
                rank,
                layers,
                tokens,
                offered,
                table,
            )
            try:
                transfer = self._transport.read(self._peers[rank], table, units, self._ticket)
            except TransportError as error:
                transfer = Transfer(self._peers[rank], 0)
                transfer.finish("none", error)
            self._transfers.add(transfer)
            posted[rank] = transfer
        return posted

    async def _done(self, transfers: Collection[Transfer]) -> TransferReport:
        """Wait for all to complete; then raise the first error, if there is one."""
        waits = (transfer.wait() for transfer in transfers)
        outcomes = await asyncio.gather(*waits, return_exceptions=True)
        reports = []
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
            reports.append(outcome)
        return joined(reports)

    def _verify(
        self,
        layers: LayerRange,
        tokens: TokenRange,
        offered: Sequence[OfferedBlock],
        landing_blocks: Sequence[int],
        memory: Memory | HashesItself,
        on_the_way: Mapping[Rank, Digests] | None,
    ) -> None:
        """Compare the digests of what has landed in `memory` with what was offered."""
        place, digests = self._place, self._digests
        if on_the_way is None:
            wrong = digests.first_wrong(place, layers, tokens, offered, landing_blocks, memory)
        else:
            wrong = digests.first_wrong_of(place, layers, tokens, offered, on_the_way)
        if wrong is not None:
            raise WrongKV(f"KV of the prompt from token {wrong} on is not what prefill offered")


def _on_the_way(transfers: Mapping[Rank, Transfer]) -> dict[Rank, Digests] | None:
    """Return the hashes that the transport took while it read; None if some are missing."""
    hashes = {
        rank: transfer.hashes for rank, transfer in transfers.items() if transfer.hashes is not None
    }
    return hashes if hashes and len(hashes) == len(transfers) else None


def joined(reports: Sequence[TransferReport]) -> TransferReport:
    """Return the report of reads that were under way together."""
    if len(reports) == 1:
        return reports[0]
    carriers = sorted({report.transport for report in reports if report.bytes})
    return TransferReport(
        sum(report.bytes for report in reports),
        max((report.seconds for report in reports), default=0.0),
        "+".join(carriers) or "none",
    )
