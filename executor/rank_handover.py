"""One rank's part of one attempt of a handover: reads into its own blocks, digests of its own.

The leader decides what is read and when (kv_transfer/receiver.py); each rank finds out by the
transfer plan what of it is its own, reads that from the source ranks that have it, and verifies it.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from baton.core.errors import PeerLost, TransportError, WrongKV
from baton.core.handover import BlockRef, OfferedBlock
from baton.core.ids import BlockId, Epoch, Ticket
from baton.core.kv_layout import KVLayout, LayerRange
from baton.core.sharded_layout import Rank, ShardedLayout
from baton.kv_transfer.digest import DigestKey
from baton.kv_transfer.plan import TokenRange, plan_between
from baton.kv_transfer.runs import RunTable
from baton.kv_transfer.transport import Peer, Transfer, TransferReport, Transport


@dataclass(frozen=True, slots=True)
class HandoverTerms:
    """What all ranks of one side must know of an attempt."""

    source: ShardedLayout
    target: ShardedLayout
    compatibility: str
    ticket: Ticket
    prompt: tuple[int, ...]

    def pack(self) -> list[Any]:
        """Return it as lists and numbers."""
        sides = [self.source.describe(), self.target.describe()]
        return [*sides, self.compatibility, self.ticket, self.prompt]

    @classmethod
    def unpack(cls, packed: Sequence[Any]) -> "HandoverTerms":
        """Return the terms that were packed."""
        source, target, compatibility, ticket, prompt = packed
        return cls(_layout(source), _layout(target), compatibility, ticket, tuple(prompt))


@dataclass(frozen=True, slots=True)
class ReadOrder:
    """What of an offer is read, and into which blocks."""

    layers: LayerRange
    tokens: TokenRange
    offered: tuple[OfferedBlock, ...]
    """From the one with the first of `tokens` on."""
    blocks: tuple[BlockId, ...]
    """The reader's, from the one for the first of `tokens` on."""

    def pack(self) -> list[Any]:
        """Return it as lists and numbers."""
        offered = [[b.ref.block, b.ref.epoch, b.digest] for b in self.offered]
        layers, tokens = self.layers, self.tokens
        return [layers.start, layers.end, tokens.start, tokens.end, offered, self.blocks]

    @classmethod
    def unpack(cls, packed: Sequence[Any]) -> "ReadOrder":
        """Return the order that was packed."""
        first, last, start, end, offered, blocks = packed
        return cls(
            LayerRange(first, last),
            TokenRange(start, end),
            tuple(OfferedBlock(BlockRef(BlockId(b), Epoch(e)), d) for b, e, d in offered),
            tuple(blocks),
        )


@dataclass(frozen=True, slots=True)
class DigestOrder:
    """Which blocks of a prompt are offered."""

    layers: LayerRange
    first_block: int
    """The number, in the prompt, of the first of `refs`."""
    refs: tuple[BlockRef, ...]

    def pack(self) -> list[Any]:
        """Return it as lists and numbers."""
        refs = [number for ref in self.refs for number in (ref.block, ref.epoch)]
        return [self.layers.start, self.layers.end, self.first_block, refs]

    @classmethod
    def unpack(cls, packed: Sequence[Any]) -> "DigestOrder":
        """Return the order that was packed."""
        first, last, first_block, numbers = packed
        pairs = zip(numbers[::2], numbers[1::2], strict=True)
        refs = tuple(BlockRef(BlockId(block), Epoch(epoch)) for block, epoch in pairs)
        return cls(LayerRange(first, last), first_block, refs)


class RankHandover:
    """One rank, one attempt. One event loop only; hashing runs in threads."""

    def __init__(
        self, terms: HandoverTerms, place: Rank, transport: Transport, memory: memoryview
    ) -> None:
        """`place` is this rank's in its instance; `memory` is its pool."""
        self._plan = plan_between(terms.source, terms.target)
        self._turn = self._plan.turn(terms.ticket)
        self._digests = DigestKey(
            self._plan,
            compatibility=terms.compatibility,
            ticket=terms.ticket,
            prompt=terms.prompt,
        )
        self._place = place
        self._transport = transport
        self._memory = memory
        self._peers: dict[Rank, Peer] = {}
        self._transfers: set[Transfer] = set()

    def __repr__(self) -> str:
        return f"RankHandover({self._place}, {len(self._peers)} peers)"

    async def connect(self, sources: Sequence[bytes]) -> None:
        """Make the source ranks readable that have something for this one.

        `sources` is how each is read, in the order of the layout's ranks. Raises TransportError.
        """
        layers = self._plan.source.model.all_layers
        links = self._plan.links(self._place, layers, self._turn)
        ranks = self._plan.source.ranks
        if len(sources) != len(ranks):
            raise TransportError(f"{len(sources)} ways to read {len(ranks)} ranks")
        for rank in dict.fromkeys(link.source for link in links):
            self._peers[rank] = await self._transport.add_peer(sources[ranks.index(rank)])

    async def read(self, order: ReadOrder) -> TransferReport:
        """Read and verify this rank's part; returns or raises once none of it can be written.

        Raises TransportError if it cannot be read, WrongKV if it is not what was offered.
        """
        runs = self._plan.reads(
            self._place,
            order.layers,
            order.tokens,
            [offered.ref.block for offered in order.offered],
            order.blocks,
            turn=self._turn,
        )
        try:
            reports = await self._done(runs)
        except PeerLost:
            await self.drop()
            raise
        await asyncio.to_thread(self._verify, order)
        return joined(reports)

    async def _done(self, runs: Mapping[Rank, RunTable]) -> list[TransferReport]:
        """Read from all source ranks; when this returns or raises, all reads have completed."""
        posted: list[Transfer] = []
        refused: TransportError | None = None
        try:
            for rank, table in runs.items():
                posted.append(self._transport.read(self._peers[rank], table))
        except TransportError as error:
            refused = error
        self._transfers.update(posted)
        try:
            waits = (transfer.wait() for transfer in posted)
            outcomes = await asyncio.gather(*waits, return_exceptions=True)
        finally:
            self._transfers -= {transfer for transfer in posted if transfer.completed}
        for outcome in (refused, *outcomes):
            if isinstance(outcome, BaseException):
                raise outcome
        return [outcome for outcome in outcomes if isinstance(outcome, TransferReport)]

    async def drop(self) -> None:
        """Close the peers' endpoints by force, so that reads under way end."""
        for peer in self._peers.values():
            await self._transport.remove_peer(peer)

    async def fence(self) -> None:
        """Return once nothing of this attempt can be written any more."""
        if any(not transfer.completed for transfer in self._transfers):
            await self.drop()
        waits = (transfer.wait() for transfer in self._transfers)
        await asyncio.gather(*waits, return_exceptions=True)

    async def digest(self, order: DigestOrder) -> list[bytes]:
        """Return, for each block, the digests of what this rank has of it."""
        return await asyncio.to_thread(
            self._digests.offered,
            self._place,
            order.layers,
            order.first_block,
            order.refs,
            self._memory,
        )

    def _verify(self, order: ReadOrder) -> None:
        """Compare the digests of what now lies in this rank's blocks with what was offered."""
        wrong = self._digests.first_wrong(
            self._place, order.layers, order.tokens, order.offered, order.blocks, self._memory
        )
        if wrong is not None:
            raise WrongKV(f"KV of the prompt from token {wrong} on is not what prefill offered")


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


def _layout(described: dict[str, Any]) -> ShardedLayout:
    model = KVLayout(**described["model"])
    return ShardedLayout(model, described["tp"], tuple(described["stages"]))
