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

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from baton.kv_transfer.plan import TokenRange, TransferPlan, UnitReads
from baton.kv_transfer.runs import Ints
from baton.kv_transfer.transport import ReadUnits
from baton.kv_transfer.units import (
    PlacedUnits,
    held_units,
    in_memory,
    offered_places,
    read_facts,
    read_units,
)

_WORD = np.dtype("<u8")
_REF = struct.Struct("<QQ")
_FEW = 16
"""Labels up to which to join their parts takes less than to fill columns."""
_WORDS = 8
"""Of a label: 2 of the prefix's hash, block, epoch, 3 of the unit's facts, and zeros."""


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

    def prepare(self) -> None:
        """Make what all digests need, which otherwise the first ones do; in any thread."""
        _ = self._hash_key, self._prefixes

    @cached_property
    def _chain(self) -> bytes:
        """A hash per unit of the prompt, end to end; made with the first digests."""
        return b"".join(chain_hashes(self._prompt, self._plan.unit_tokens, self._root))

    @cached_property
    def _prefixes(self) -> NDArray[np.uint64]:
        """The same as words [units, 2]."""
        return np.frombuffer(self._chain, _WORD).reshape(-1, 2)

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
        reads: UnitReads,
    ) -> ReadUnits:
        """Return `reads`, those of TransferPlan from one source rank, as units to be hashed.

        For a transport that hashes on the way; `first_wrong_of` knows its hashes by the order of
        `tokens`, one of each unit.
        """
        (into, remote, lengths), ends = reads.by_unit()
        labels = self._labels_read(rank, source, layers, tokens, offered)
        return ReadUnits(self._hash_key, labels, Pieces(remote, lengths, ends), into)

    def _labels_read(
        self,
        rank: Rank,
        source: Rank,
        layers: LayerRange,
        tokens: TokenRange,
        offered: Sequence[OfferedBlock],
    ) -> Labels:
        """Return the labels of the units that a rank reads from one source rank, in order."""
        plan = self._plan
        first, count = tokens.start // plan.unit_tokens, plan.num_units(tokens)
        facts = read_facts(plan, rank, source, layers, self._turn)
        if count == len(offered) <= _FEW and facts.shape[0] == 1:
            return self._few_labels(first, offered, facts)
        refs = _words_of([block.ref for block in offered])
        if refs.shape[0] != count or facts.shape[0] > 1:
            units = np.arange(first, first + count)
            per_block = plan.source.model.block_size // plan.unit_tokens
            refs = refs[units // per_block - first // per_block]
            facts = facts[units % facts.shape[0]]
        return _labels((count,), self._prefixes[first : first + count], refs, facts)

    def _few_labels(
        self, first: int, offered: Sequence[OfferedBlock], facts: NDArray[np.uint32]
    ) -> Labels:
        """Return the labels of units, one of each block, from number `first` on; see `_labels`."""
        chain, rest = self._chain, facts.tobytes() + bytes(_WORD.itemsize)
        lines = [
            chain[at * HASH_BYTES : (at + 1) * HASH_BYTES]
            + _REF.pack(block.ref.block, block.ref.epoch)
            + rest
            for at, block in enumerate(offered, first)
        ]
        return np.frombuffer(b"".join(lines), np.uint8).reshape(len(lines), -1)

    def first_wrong_of(
        self,
        rank: Rank,
        layers: LayerRange,
        tokens: TokenRange,
        offered: Sequence[OfferedBlock],
        hashes: Mapping[Rank, Digests],
    ) -> int | None:
        """Return what `first_wrong` does, of hashes that a transport took as it wrote.

        By source rank; of `units_read`, from every rank that `TransferPlan.reads` has.
        """
        if self._all_right(rank, layers, tokens, offered, hashes):
            return None

        def found(read: PlacedUnits, starts: Sequence[int], _: Sequence[BlockRef]) -> Digests:
            index = [(at - tokens.start) // self._plan.unit_tokens for at in starts]
            return np.stack([hashes[unit.source][index] for unit in read.units], axis=1)

        return self._first_wrong(rank, layers, tokens, offered, found)

    def _all_right(
        self,
        rank: Rank,
        layers: LayerRange,
        tokens: TokenRange,
        offered: Sequence[OfferedBlock],
        hashes: Mapping[Rank, Digests],
    ) -> bool:
        """Return whether that is seen at once: blocks are as large on both sides, and all right."""
        plan = self._plan
        if plan.unit_tokens != plan.offer_tokens:
            return False
        units, read = offered_places(plan, rank, layers, 0, plan.unit_tokens, self._turn)
        digests = [block.digest for block in offered]
        if any(len(digest) != units * HASH_BYTES for digest in digests):
            return False
        if units == len(hashes) == 1:
            (found,) = hashes.values()
            return b"".join(digests) == found.tobytes()
        promised = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, units, HASH_BYTES)
        sources = [unit.source for unit in read_units(plan, rank, layers, 0, self._turn).units]
        return all(
            promised[:, place].tobytes() == hashes[source].tobytes()
            for source, place in zip(sources, read.tolist(), strict=True)
        )

    def first_wrong(
        self,
        rank: Rank,
        layers: LayerRange,
        tokens: TokenRange,
        offered: Sequence[OfferedBlock],
        landing_blocks: Sequence[int],
        memory: Memory | HashesItself,
    ) -> int | None:
        """Return the first token of a unit that is not what was offered; None if all are.

        Checks what `TransferPlan.reads` brought to a target rank, with the same arguments;
        `offered` begins with the block that holds `tokens.start`, and `memory` with the first
        block of those that bytes landed in: the rank's pool, or staging.
        """
        landing = self._plan.landing(rank, layers).layout
        first = tokens.start // landing.block_size

        def found(read: PlacedUnits, starts: Sequence[int], refs: Sequence[BlockRef]) -> Digests:
            ours = [landing_blocks[at // landing.block_size - first] for at in starts]
            begins = [block * landing.block_bytes for block in ours]
            numbers = [at // self._plan.source.model.block_size for at in starts]
            return self._hash(read, numbers, refs, begins, memory)

        return self._first_wrong(rank, layers, tokens, offered, found)

    def _first_wrong(
        self,
        rank: Rank,
        layers: LayerRange,
        tokens: TokenRange,
        offered: Sequence[OfferedBlock],
        found: "_Found",
    ) -> int | None:
        """Compare what was `found` with what was offered, units at like places together."""
        plan = self._plan
        size = plan.source.model.block_size
        larger = plan.offer_tokens // plan.unit_tokens
        starts = range(tokens.start, tokens.end, plan.unit_tokens)
        first = tokens.start // size
        wrong: list[int] = []
        for place in range(min(larger, len(starts))):
            # Those at the same place of the larger block lie alike, each in another source block.
            by_number = {start // size: start for start in starts[place::larger]}
            where = starts[place] // plan.unit_tokens % larger
            read = read_units(plan, rank, layers, where, self._turn)
            for numbers in self._alike(list(by_number)):
                alike = [by_number[number] for number in numbers]
                theirs = [offered[number - first] for number in numbers]
                used = self._used_slots(numbers[0])
                places = offered_places(plan, rank, layers, where, used, self._turn)
                differ = found(read, alike, [each.ref for each in theirs]) != _promised(
                    theirs, *places
                )
                rows = differ.any(axis=(1, 2))
                wrong += [at for at, differs in zip(alike, rows, strict=True) if differs]
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
        size, step = self._plan.source.model.block_size, self._plan.unit_tokens
        first = np.array(numbers, np.int64) * (size // step)
        prefixes = self._prefixes[first[:, None] + placed.facts[:, 4] // step]
        shape = len(refs), len(placed.units)
        labels = _labels(shape, prefixes, _words_of(refs)[:, None], placed.facts)
        pieces = in_memory(placed, np.array(begins, np.int64))
        hashes = hash_units(self._hash_key, memory, pieces, labels)
        return hashes.reshape(*shape, HASH_BYTES)


_Found = Callable[[PlacedUnits, Sequence[int], Sequence[BlockRef]], Digests]
"""Returns the digests [blocks, units, 16] of units that begin at like places of some blocks: given
the units, the token that each block's begin with, and the blocks."""


def _words_of(refs: Sequence[BlockRef]) -> NDArray[np.uint64]:
    """Return block and epoch of each [refs, 2]."""
    words = np.array([[ref.block for ref in refs], [ref.epoch for ref in refs]], np.uint64)
    return words.T


def _labels(
    shape: tuple[int, ...],
    prefixes: NDArray[np.uint64],
    refs: NDArray[np.uint64],
    facts: NDArray[np.uint32],
) -> Labels:
    """Return a line for each unit, from what is given for each or broadcasts to all."""
    words = np.zeros((*shape, _WORDS), _WORD)
    words[..., :2] = prefixes
    words[..., 2:4] = refs
    words.view("<u4")[..., 8:14] = facts
    return words.view(np.uint8).reshape(-1, _WORDS * _WORD.itemsize)


def _promised(offered: Sequence[OfferedBlock], units: int, read: Ints) -> Digests:
    """Return what was offered for the units that were read [blocks, units, 16].

    `read` says which they are of the `units` of each block. Where the length is wrong nothing was
    offered: in its stead come bits that no digest has set.
    """
    size = units * HASH_BYTES
    malformed = b"\xff" * size
    digests = (each.digest if len(each.digest) == size else malformed for each in offered)
    table = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, units, HASH_BYTES)
    return table[:, read]
