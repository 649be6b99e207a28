"""The digests of an offer: of its bytes, and of everything that says whose bytes they are.

A digest that matches proves that what was read is the KV of *this* prefix, for *this* model and
revision, between *these* layouts, of *these* layers and heads, from *this* epoch of the block,
offered under *this* ticket. Each unit (see units.py) has its own, so that a rank can check what it
read and nothing else. A digest covers bytes as they were read, scales included, before any
conversion, and slots beyond the end of the prompt where they travel.

A digest is the hash of kernels/kv_digest.py over the bytes and a label, under a key made for the
attempt from model, revision, layouts and ticket; the label holds the hash of the prefix, block,
epoch, layers, heads and slots. Whatever changed any of it without knowing the ticket (flipped bits,
torn or late reads, blocks of other requests), it fits a digest for a share of at most 2⁻⁶² of all
keys; the kernel has the proof. It is no signature: both sides know the key, and who can choose the
bytes of both can make two that match. Peers themselves are kept out by the transport's
authentication.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from baton.core.handover import BlockRef, OfferedBlock
from baton.core.hashing import HASH_BYTES, chain_hashes, hash_bytes
from baton.core.ids import Ticket
from baton.core.kv_layout import LayerRange
from baton.core.sharded_layout import Rank
from baton.kernels.kv_digest import (
    Digests,
    HashesItself,
    Labels,
    Memory,
    Pieces,
    expand_key,
    hash_units,
)
from baton.kv_transfer.plan import TokenRange, TransferPlan
from baton.kv_transfer.transport import ReadUnits
from baton.kv_transfer.units import PlacedUnits, held_units, in_memory, read_units, units_of_block

_LABEL = np.dtype(
    [("prefix", "V16"), ("block", "<u8"), ("epoch", "<u8"), ("unit", "<u4", 6), ("zeros", "V8")]
)
"""One line of the hash."""


class DigestKey:
    """Makes and checks the digests of one attempt of one handover."""

    def __init__(
        self, plan: TransferPlan, *, compatibility: str, ticket: Ticket, prompt: Sequence[int]
    ) -> None:
        assert len(ticket) == HASH_BYTES, "a ticket has 128 bits"
        self._plan = plan
        self._root = hash_bytes(compatibility.encode(), plan.identity, ticket)
        self._prompt = prompt
        self._tokens = len(prompt)
        self._turn = plan.turn(ticket)

    @cached_property
    def _prefixes(self) -> NDArray[np.void]:
        """A hash per unit of the prompt; made with the first digests, in their thread."""
        hashes = chain_hashes(self._prompt, self._plan.unit_tokens, self._root)
        return np.frombuffer(b"".join(hashes), "V16")

    @cached_property
    def _hash_key(self) -> bytes:
        return expand_key(self._root)

    def offered(
        self,
        rank: Rank,
        layers: LayerRange,
        first_block: int,
        refs: Sequence[BlockRef],
        memory: Memory | HashesItself,
    ) -> list[bytes]:
        """Return, per block, the digests of the units that a source rank holds, end to end.

        `refs` are the prompt's blocks from number `first_block` on; `memory` is the bytes of the
        rank's pool. The digests of an OfferedBlock are those of all ranks, end to end in the order
        of the ranks.
        """
        block_bytes = self._plan.source.shard(rank).layout.block_bytes
        digests: list[bytes] = []
        for numbers in self._alike(range(first_block, first_block + len(refs))):
            slots = self._used_slots(numbers[0])
            held = held_units(self._plan, rank, layers, slots, self._turn)
            theirs = [refs[number - first_block] for number in numbers]
            begins = [ref.block * block_bytes for ref in theirs]
            digests += [
                of_block.tobytes() for of_block in self._hash(held, numbers, theirs, begins, memory)
            ]
        return digests

    def units_read(
        self,
        rank: Rank,
        source: Rank,
        layers: LayerRange,
        tokens: TokenRange,
        offered: Sequence[OfferedBlock],
        landing_blocks: Sequence[int],
        *,
        landing_offset: int = 0,
    ) -> ReadUnits:
        """Return what `TransferPlan.reads` brings from one source rank, as units to be hashed.

        For a transport that hashes on the way; `first_wrong` knows its hashes by the order of
        `tokens`, one of each unit.
        """
        plan = self._plan
        refs = [block.ref for block in offered]
        runs, ends = plan.unit_reads(
            rank,
            layers,
            tokens,
            [ref.block for ref in refs],
            landing_blocks,
            landing_offset=landing_offset,
            turn=self._turn,
        )[source]
        return ReadUnits(
            key=self._hash_key,
            labels=self._labels_read(rank, source, layers, tokens, refs),
            pieces=Pieces(runs.remote, runs.length, ends),
            into=runs.local,
        )

    def _labels_read(
        self,
        rank: Rank,
        source: Rank,
        layers: LayerRange,
        tokens: TokenRange,
        refs: Sequence[BlockRef],
    ) -> Labels:
        """Return the labels of the units that a rank reads from one source rank, in order."""
        plan = self._plan
        units = tokens.start // plan.unit_tokens + np.arange(plan.num_units(tokens))
        larger = plan.offer_tokens // plan.unit_tokens
        facts = []
        for place in range(larger):
            read = read_units(plan, rank, layers, place, self._turn)
            (of_source,) = (n for n, unit in enumerate(read.units) if unit.source == source)
            facts.append(read.facts[of_source])
        block = units // (plan.source.model.block_size // plan.unit_tokens)
        block -= block[:1]
        labels = np.zeros(units.size, _LABEL)
        labels["prefix"] = self._prefixes[units]
        labels["block"] = np.array([ref.block for ref in refs], np.uint64)[block]
        labels["epoch"] = np.array([ref.epoch for ref in refs], np.uint64)[block]
        labels["unit"] = np.array(facts)[units % larger]
        return labels.view(np.uint8).reshape(-1, _LABEL.itemsize)

    def first_wrong(
        self,
        rank: Rank,
        layers: LayerRange,
        tokens: TokenRange,
        offered: Sequence[OfferedBlock],
        landing_blocks: Sequence[int],
        memory: Memory | HashesItself,
        on_the_way: Mapping[Rank, Digests] | None = None,
    ) -> int | None:
        """Return the first token of a unit that is not what was offered; None if all are.

        Checks what `TransferPlan.reads` brought to a target rank, with the same arguments;
        `offered` begins with the block that holds `tokens.start`, and `memory` with the first
        block of those that bytes landed in: the rank's pool, or staging. It is read again unless
        the transport hashed what it wrote, from every source rank: `on_the_way`, of `units_read`.
        """
        plan = self._plan
        landing = plan.landing(rank, layers).layout
        size = plan.source.model.block_size
        larger = plan.offer_tokens // plan.unit_tokens
        starts = range(tokens.start, tokens.end, plan.unit_tokens)
        first_ours, first_theirs = tokens.start // landing.block_size, tokens.start // size
        wrong: list[int] = []
        for place in range(min(larger, len(starts))):
            # Those at the same place of the larger block lie alike, each in another source block.
            by_number = {start // size: start for start in starts[place::larger]}
            read = read_units(
                plan, rank, layers, starts[place] // plan.unit_tokens % larger, self._turn
            )
            for numbers in self._alike(list(by_number)):
                alike = [by_number[number] for number in numbers]
                theirs = [offered[number - first_theirs] for number in numbers]
                if on_the_way is None:
                    ours = [landing_blocks[at // landing.block_size - first_ours] for at in alike]
                    begins = [block * landing.block_bytes for block in ours]
                    refs = [block.ref for block in theirs]
                    found = self._hash(read, numbers, refs, begins, memory)
                else:
                    index = [(at - tokens.start) // plan.unit_tokens for at in alike]
                    found = np.stack([on_the_way[u.source][index] for u in read.units], axis=1)
                promised = self._promised(layers, numbers[0], read, theirs)
                differ = (found != promised).any(axis=(1, 2))
                wrong += [at for at, differs in zip(alike, differ, strict=True) if differs]
        return min(wrong, default=None)

    def _alike(self, numbers: Sequence[int]) -> Iterator[Sequence[int]]:
        """Cut source blocks of the prompt, in order, into those with as many units each."""
        last = numbers[-1:]
        few = len(last) and self._used_slots(last[0]) < self._plan.source.model.block_size
        parts = (numbers[:-1], last) if few else (numbers,)
        return (part for part in parts if len(part))

    def _used_slots(self, number: int) -> int:
        """Return the slots of the prompt's source block `number` that have tokens, in units."""
        size, step = self._plan.source.model.block_size, self._plan.unit_tokens
        return min(size, -(-(self._tokens - number * size) // step) * step)

    def _promised(
        self, layers: LayerRange, number: int, read: PlacedUnits, offered: Sequence[OfferedBlock]
    ) -> Digests:
        """Return what was offered for the units that were read [blocks, units, 16].

        The blocks have as many units as source block `number`. Where the length is wrong nothing
        was offered: in its stead come bits that no digest has set.
        """
        units = units_of_block(self._plan, layers, self._used_slots(number), self._turn)
        place = {unit: index for index, unit in enumerate(units)}
        size = len(units) * HASH_BYTES
        malformed = b"\xff" * size
        digests = (each.digest if len(each.digest) == size else malformed for each in offered)
        table = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, len(units), HASH_BYTES)
        return table[:, [place[unit] for unit in read.units]]

    def _hash(
        self,
        placed: PlacedUnits,
        numbers: Sequence[int],
        refs: Sequence[BlockRef],
        begins: Sequence[int],
        memory: Memory | HashesItself,
    ) -> Digests:
        """Return the digests of units of source blocks `numbers` [blocks, units, 16].

        They lie alike in the memory from `begins` on: at the source or where they have landed.
        """
        labels = self._labels(placed, numbers, refs)
        pieces = in_memory(placed, np.array(begins, np.int64))
        hashes = hash_units(self._hash_key, memory, pieces, labels)
        return hashes.reshape(len(refs), len(placed.units), HASH_BYTES)

    def _labels(
        self, placed: PlacedUnits, numbers: Sequence[int], refs: Sequence[BlockRef]
    ) -> Labels:
        size, step = self._plan.source.model.block_size, self._plan.unit_tokens
        first = np.array(numbers, np.int64) * (size // step)
        labels = np.zeros((len(refs), len(placed.units)), _LABEL)
        labels["prefix"] = self._prefixes[first[:, None] + placed.facts[:, 4] // step]
        labels["block"] = np.array([ref.block for ref in refs], np.uint64)[:, None]
        labels["epoch"] = np.array([ref.epoch for ref in refs], np.uint64)[:, None]
        labels["unit"] = placed.facts
        return labels.view(np.uint8).reshape(-1, _LABEL.itemsize)
