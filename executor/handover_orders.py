"""What the leader tells the other ranks of a handover: terms once, then what to read or digest."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from baton.core.handover import BlockRef, OfferedBlock
from baton.core.ids import BlockId, Epoch, Ticket
from baton.core.kv_layout import KVLayout, LayerRange
from baton.core.sharded_layout import ShardedLayout
from baton.kv_transfer.digest import DigestKey
from baton.kv_transfer.plan import TokenRange, TransferPlan, plan_between


@dataclass(frozen=True, slots=True)
class HandoverTerms:
    """What all ranks of one side must know of an attempt."""

    source: ShardedLayout
    target: ShardedLayout
    compatibility: str
    ticket: Ticket
    prompt: tuple[int, ...]
    staged: bool = False
    """Whether no transport can write the target's blocks."""
    direct: bool = False
    """Whether the blocks on both sides are on devices, and read from one to the other."""

    def pack(self) -> list[Any]:
        """Return it as lists and numbers."""
        sides = [self.source.describe(), self.target.describe()]
        return [*sides, self.compatibility, self.ticket, self.prompt, self.staged, self.direct]

    @classmethod
    def unpack(cls, packed: Sequence[Any]) -> "HandoverTerms":
        """Return the terms that were packed."""
        source, target, compatibility, ticket, prompt, staged, direct = packed
        sides = _layout(source), _layout(target)
        return cls(*sides, compatibility, ticket, tuple(prompt), staged, direct)

    @property
    def plan(self) -> TransferPlan:
        """How KV gets from one side to the other."""
        return plan_between(self.source, self.target, staged=self.staged)

    def digests(self) -> DigestKey:
        """Return what makes and checks the attempt's digests."""
        return DigestKey(
            self.plan,
            compatibility=self.compatibility,
            ticket=self.ticket,
            prompt=self.prompt,
        )


@dataclass(frozen=True, slots=True)
class ReadOrder:
    """What of an offer is read, and into which blocks."""

    layers: LayerRange
    tokens: TokenRange
    offered: tuple[OfferedBlock, ...]
    """From the one with the first of `tokens` on."""
    blocks: tuple[BlockId, ...]
    """The reader's, from the one for the first of `tokens` on."""

    def counted_in(self, blocks: int, source_blocks: int) -> "ReadOrder":
        """Return the same with blocks numbered within the pools, of so many blocks, they are in."""
        offered = tuple(
            OfferedBlock(_within(block.ref, source_blocks), block.digest) for block in self.offered
        )
        ours = tuple(BlockId(block % blocks) for block in self.blocks)
        return replace(self, offered=offered, blocks=ours)

    def part(
        self, tokens: TokenRange, plan: TransferPlan
    ) -> tuple[Sequence[OfferedBlock], Sequence[BlockId]]:
        """Return the offered blocks, and the reader's, of some of the tokens."""
        theirs, ours = plan.source.model.block_size, plan.target.model.block_size
        first = self.tokens.start // theirs
        offered = self.offered[tokens.start // theirs - first : -(-tokens.end // theirs) - first]
        first = self.tokens.start // ours
        return offered, self.blocks[tokens.start // ours - first : -(-tokens.end // ours) - first]

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
    pages: tuple[BlockRef, ...] = ()
    """Of staging, to copy the blocks to and to offer instead; none if blocks are read in place."""

    def counted_in(self, blocks: int) -> "DigestOrder":
        """Return the same with blocks numbered within the pool, of so many, that they are in."""
        return replace(self, refs=tuple(_within(ref, blocks) for ref in self.refs))

    def pack(self) -> list[Any]:
        """Return it as lists and numbers."""
        refs, pages = _numbers(self.refs), _numbers(self.pages)
        return [self.layers.start, self.layers.end, self.first_block, refs, pages]

    @classmethod
    def unpack(cls, packed: Sequence[Any]) -> "DigestOrder":
        """Return the order that was packed."""
        first, last, first_block, refs, pages = packed
        return cls(LayerRange(first, last), first_block, _refs(refs), _refs(pages))


def _within(ref: BlockRef, blocks: int) -> BlockRef:
    return BlockRef(BlockId(ref.block % blocks), ref.epoch)


def _numbers(refs: Sequence[BlockRef]) -> list[int]:
    return [number for ref in refs for number in (ref.block, ref.epoch)]


def _refs(numbers: Sequence[int]) -> tuple[BlockRef, ...]:
    pairs = zip(numbers[::2], numbers[1::2], strict=True)
    return tuple(BlockRef(BlockId(block), Epoch(epoch)) for block, epoch in pairs)


def _layout(described: dict[str, Any]) -> ShardedLayout:
    model = KVLayout(**described["model"])
    return ShardedLayout(model, described["tp"], tuple(described["stages"]))
