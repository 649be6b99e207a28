"""Reads the offers of one attempt into decode's blocks, and verifies them, on one of two ways.

    in place     transport ─▶ blocks, verified there
    staged       transport ─▶ a page of staging, verified there ─▶ blocks; a piece of the offer at
                 a time, so that a page is held no longer than that takes

Whatever ends a read, a page is given back only once nothing can write it any more.
"""

import asyncio
from collections.abc import Iterator, Mapping, Sequence

from baton.core.errors import DeadlineExceeded, TransportError, WrongKV
from baton.core.handover import OfferedBlock, Open
from baton.core.kv_layout import LayerRange
from baton.core.moving_average import MovingAverage
from baton.core.sharded_layout import Rank
from baton.executor.instance import Instance
from baton.executor.staging import Staging
from baton.kv_transfer.digest import DigestKey
from baton.kv_transfer.landing import pieces
from baton.kv_transfer.plan import TokenRange, TransferPlan
from baton.kv_transfer.receiver_events import Read
from baton.kv_transfer.staging_pool import Claim
from baton.kv_transfer.transport import Peer, Transfer, TransferReport

_TELLING_BYTES = 1 << 16
"""A smaller read says more of latency than of bandwidth."""

FIRST_RANK = Rank()
"""The only one of an instance of one rank."""


class OfferReader:
    """What one rank of decode reads in one attempt, from as many ranks of prefill as it takes."""

    def __init__(
        self,
        instance: Instance,
        plan: TransferPlan,
        open_: Open,
        bandwidth: MovingAverage,
        rank: Rank = FIRST_RANK,
    ) -> None:
        """`rank` is the one that reads: `instance` has its pool and its transport."""
        self._peers: dict[Rank, Peer] = {}
        self._instance = instance
        self._plan = plan
        self._rank = rank
        self._turn = plan.turn(open_.ticket)
        self._digests = DigestKey(
            plan,
            compatibility=open_.compatibility,
            ticket=open_.ticket,
            prompt=open_.request.prompt,
        )
        self._bandwidth = bandwidth
        self._transfers: set[Transfer] = set()
        self._jobs: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        return f"OfferReader({[*map(str, self._peers.values())]}, {self._plan})"

    async def read(self, action: Read) -> TransferReport:
        """Read an offer into its blocks; when this returns, nothing of it is written any more.

        Raises TransportError if it cannot be read, DeadlineExceeded if staging stays full, WrongKV
        if it is not what was offered.
        """
        if self._plan.in_place:
            return await self._read_in_place(action)
        staging = self._instance.memory.staging
        assert staging is not None, "a plan with staging, and none there"
        layers = action.offer.layers
        parts = pieces(self._plan, self._rank, layers, action.tokens, staging.page_bytes)
        reports = [await self._read_staged(action, part, staging) for part in parts]
        return TransferReport(
            sum(report.bytes for report in reports),
            sum(report.seconds for report in reports),
            reports[-1].transport,
        )

    async def connect(self, transports: Mapping[Rank, bytes]) -> None:
        """Make the memory of prefill's ranks readable; raises TransportError if it is not."""
        for source, metadata in transports.items():
            self._peers[source] = await self._instance.transport.add_peer(metadata)

    async def drop_peers(self) -> None:
        """Close the peers' endpoints by force, so that reads under way end."""
        for peer in self._peers.values():
            await self._instance.transport.remove_peer(peer)

    async def fence(self) -> None:
        """Return once nothing of this attempt is read or written any more; reads have no caller."""
        if any(not transfer.completed for transfer in self._transfers):
            await self.drop_peers()
        ends = (transfer.wait() for transfer in self._transfers)
        await asyncio.gather(*ends, *self._jobs, return_exceptions=True)

    async def _read_in_place(self, action: Read) -> TransferReport:
        blocks = [ref.block for ref in action.blocks]
        layers, tokens, offered = action.offer.layers, action.tokens, action.offer.blocks
        report = await self._done(self._post(layers, tokens, offered, blocks, 0))
        memory = self._instance.kv.memory
        await asyncio.to_thread(self._verify, layers, tokens, offered, blocks, memory)
        return report

    async def _read_staged(
        self, action: Read, part: TokenRange, staging: Staging
    ) -> TransferReport:
        theirs, ours = self._plan.source.model.block_size, self._plan.target.model.block_size
        first = part.start // theirs - action.offer.first_block
        offered = action.offer.blocks[first : -(-part.end // theirs) - action.offer.first_block]
        first = part.start // ours - action.tokens.start // ours
        end = -(-part.end // ours) - action.tokens.start // ours
        blocks = [ref.block for ref in action.blocks[first:end]]
        layers, units = action.offer.layers, range(self._plan.num_units(part))
        claim = await self._claim(staging)
        page = claim.pages[0].block
        transfers: list[Transfer] = []
        job: asyncio.Task[None] | None = None

        def take() -> None:
            self._verify(layers, part, offered, units, staging.page(page))
            conversion = self._plan.conversion(self._rank, layers, part, blocks)
            staging.deposit(page, conversion)

        def settle(_: object = None) -> None:
            if all(transfer.completed for transfer in transfers) and (job is None or job.done()):
                staging.pool.give_back(claim)

        try:
            reads = self._post(layers, part, offered, units, staging.offset(page))
            report = await self._done(reads, transfers)
            job = asyncio.create_task(asyncio.to_thread(take))
            self._jobs.add(job)
            job.add_done_callback(self._jobs.discard)
            await asyncio.shield(job)
            return report
        finally:
            settle()
            for transfer in transfers:
                transfer.then(settle)
            if job is not None:
                job.add_done_callback(settle)

    async def _claim(self, staging: Staging) -> Claim:
        """Wait for a page of staging."""
        granted = asyncio.Event()
        claim = staging.pool.claim(1, lambda _: granted.set())
        try:
            async with asyncio.timeout(self._instance.config.handover.read_timeout_s):
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
    ) -> Iterator[Transfer]:
        """Post a read to each source rank that has some of it, one by one as they are asked for."""
        tables = self._plan.reads(
            self._rank,
            layers,
            tokens,
            [block.ref.block for block in offered],
            landing_blocks,
            landing_offset=landing_offset,
            turn=self._turn,
        )
        for source, runs in tables.items():
            transfer = self._instance.transport.read(self._peers[source], runs)
            self._transfers.add(transfer)
            yield transfer

    async def _done(
        self, reads: Iterator[Transfer], posted: list[Transfer] | None = None
    ) -> TransferReport:
        """Wait until all reads have ended, well or not; `posted` is told of each that began."""
        transfers = [] if posted is None else posted
        error: BaseException | None = None
        try:
            transfers.extend(reads)  # those before one that cannot be posted stay in the list
        except TransportError as failure:
            error = failure
        ends = await asyncio.gather(*(t.wait() for t in transfers), return_exceptions=True)
        for end in ends:
            if isinstance(end, BaseException):
                error = error or end
        if error is not None:
            raise error
        return self._report([end for end in ends if isinstance(end, TransferReport)])

    def _report(self, reports: Sequence[TransferReport]) -> TransferReport:
        """Return what reads side by side are together."""
        size = sum(report.bytes for report in reports)
        seconds = max(report.seconds for report in reports)
        if size >= _TELLING_BYTES:
            self._bandwidth.add(size / seconds)
        return TransferReport(size, seconds, reports[0].transport)

    def _verify(
        self,
        layers: LayerRange,
        tokens: TokenRange,
        offered: Sequence[OfferedBlock],
        landing_blocks: Sequence[int],
        memory: memoryview,
    ) -> None:
        """Compare the digests of what has landed in `memory` with what was offered."""
        wrong = self._digests.first_wrong(
            self._rank, layers, tokens, offered, landing_blocks, memory
        )
        if wrong is not None:
            raise WrongKV(f"KV of the prompt from token {wrong} on is not what prefill offered")
