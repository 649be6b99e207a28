"""Reads the offers of one attempt into decode's blocks, and verifies them, on one of two ways.

    in place     transport ─▶ blocks, verified there
    staged       transport ─▶ a page of staging, verified there ─▶ blocks; a piece of the offer at
                 a time, so that a page is held no longer than that takes

Whatever ends a read, a page is given back only once nothing can write it any more.
"""

import asyncio
from collections.abc import Sequence

from baton.core.errors import DeadlineExceeded, WrongKV
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


class OfferReader:
    """One attempt's reads, from one peer; made once prefill has said how its KV lies."""

    def __init__(
        self, instance: Instance, plan: TransferPlan, open_: Open, bandwidth: MovingAverage
    ) -> None:
        self.peer: Peer | None = None
        """Whom to read from; set once connected."""
        self._instance = instance
        self._plan = plan
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
        return f"OfferReader({self.peer}, {self._plan})"

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
        parts = pieces(self._plan, Rank(), layers, action.tokens, staging.page_bytes)
        reports = [await self._read_staged(action, part, staging) for part in parts]
        return TransferReport(
            sum(report.bytes for report in reports),
            sum(report.seconds for report in reports),
            reports[-1].transport,
        )

    async def drop_peer(self) -> None:
        """Close the peer's endpoint by force, so that reads under way end."""
        if self.peer is not None:
            await self._instance.transport.remove_peer(self.peer)

    async def fence(self) -> None:
        """Return once nothing of this attempt is read or written any more; reads have no caller."""
        if any(not transfer.completed for transfer in self._transfers):
            await self.drop_peer()
        ends = (transfer.wait() for transfer in self._transfers)
        await asyncio.gather(*ends, *self._jobs, return_exceptions=True)

    async def _read_in_place(self, action: Read) -> TransferReport:
        blocks = [ref.block for ref in action.blocks]
        transfer = self._post(action.offer.layers, action.tokens, action.offer.blocks, blocks, 0)
        report = await self._done(transfer)
        memory = self._instance.kv.memory
        await asyncio.to_thread(
            self._verify, action.offer.layers, action.tokens, action.offer.blocks, blocks, memory
        )
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
        transfer: Transfer | None = None
        job: asyncio.Task[None] | None = None

        def take() -> None:
            self._verify(layers, part, offered, units, staging.page(page))
            staging.deposit(page, self._plan.conversion(Rank(), layers, part, blocks))

        try:
            transfer = self._post(layers, part, offered, units, staging.offset(page))
            report = await self._done(transfer)
            job = asyncio.create_task(asyncio.to_thread(take))
            self._jobs.add(job)
            job.add_done_callback(self._jobs.discard)
            await asyncio.shield(job)
            return report
        finally:
            if transfer is not None and not transfer.completed:
                transfer.then(lambda _: staging.pool.give_back(claim))
            elif job is not None and not job.done():
                job.add_done_callback(lambda _: staging.pool.give_back(claim))
            else:
                staging.pool.give_back(claim)

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
    ) -> Transfer:
        assert self.peer is not None, "a read before the peer was connected"
        runs = self._plan.reads(
            Rank(),
            layers,
            tokens,
            [block.ref.block for block in offered],
            landing_blocks,
            landing_offset=landing_offset,
        )[Rank()]
        transfer = self._instance.transport.read(self.peer, runs)
        self._transfers.add(transfer)
        return transfer

    async def _done(self, transfer: Transfer) -> TransferReport:
        report = await transfer.wait()
        if report.bytes >= _TELLING_BYTES:
            self._bandwidth.add(report.bytes / report.seconds)
        return report

    def _verify(
        self,
        layers: LayerRange,
        tokens: TokenRange,
        offered: Sequence[OfferedBlock],
        landing_blocks: Sequence[int],
        memory: memoryview,
    ) -> None:
        """Compare the digests of what has landed in `memory` with what was offered."""
        wrong = self._digests.first_wrong(Rank(), layers, tokens, offered, landing_blocks, memory)
        if wrong is not None:
            raise WrongKV(f"KV of the prompt from token {wrong} on is not what prefill offered")
