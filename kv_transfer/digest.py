"""The digests of an offer: of its bytes, and of everything that says whose bytes they are.

A digest that matches proves that what was read is the KV of *this* prefix, for *this* model and
revision, between *these* layouts, of *these* layers and heads, from *this* epoch of the block,
offered under *this* ticket. Each unit (see units.py) has its own, so that a rank can check what it
read and nothing else. A digest covers bytes as they were read, scales included, before any
conversion, and slots beyond the end of the prompt where they travel.

A digest is a hash of the bytes under a key made for the attempt (kernels/kv_digest.py), plus the
xxh3_128 of what they are said to be, as two sums modulo 2⁶⁴. Whatever changed the bytes without
knowing the ticket (flipped bits, torn or late reads, blocks of other requests), they fit the digest
of their unit for a share of at most 2⁻⁶² of all keys; there lies the proof. It is no signature:
both sides know the key, and who can choose the bytes of both can make two that match. Peers
themselves are kept out by the transport's authentication.
"""

import struct
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from baton.core.handover import BlockRef, OfferedBlock
from baton.core.hashing import HASH_BYTES, chain_hashes, hash_bytes
from baton.core.ids import Ticket
from baton.core.kv_layout import LayerRange
from baton.core.sharded_layout import Rank
from baton.kernels.kv_digest import Digests, expand_key, hash_units
from baton.kv_transfer.plan import TokenRange, TransferPlan
from baton.kv_transfer.units import Unit, held_units, in_memory, read_units, units_of_block

_HEADER = struct.Struct("<7IQ")


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
    def _prefixes(self) -> list[bytes]:
        """A hash per unit of the prompt; made with the first digests, in their thread."""
        return chain_hashes(self._prompt, self._plan.unit_tokens, self._root)

    @cached_property
    def _hash_key(self) -> bytes:
        return expand_key(self._root)

    def offered(
        self,
        rank: Rank,
        layers: LayerRange,
        first_block: int,
        refs: Sequence[BlockRef],
        memory: memoryview,
    ) -> list[bytes]:
        """Return, per block, the digests of the units that a source rank holds, end to end.

        `refs` are the prompt's blocks from number `first_block` on; `memory` is the bytes of the
        rank's pool. The digests of an OfferedBlock are those of all ranks, end to end in the order
        of the ranks.
        """
        plan = self._plan
        size = plan.source.model.block_size
        block_bytes = plan.source.shard(rank).layout.block_bytes
        numbers = range(first_block, first_block + len(refs))
        held = [
            held_units(plan, rank, layers, self._used_slots(number), self._turn)
            for number in numbers
        ]
        labels = [
            self._label(number * size + unit.slots.start, ref, unit)
            for number, ref, placed in zip(numbers, refs, held, strict=True)
            for unit in placed.units
        ]
        pieces = in_memory(held, [ref.block * block_bytes for ref in refs])
        digests = _digests(labels, hash_units(self._hash_key, memory, pieces))
        ends = np.cumsum([len(placed.units) * HASH_BYTES for placed in held]).tolist()
        return [digests[start:end] for start, end in zip([0, *ends], ends, strict=False)]

    def first_wrong(
        self,
        rank: Rank,
        layers: LayerRange,
        tokens: TokenRange,
        offered: Sequence[OfferedBlock],
        landing_blocks: Sequence[int],
        memory: memoryview,
    ) -> int | None:
        """Return the first token of a unit that is not what was offered; None if all are.

        Checks what `TransferPlan.reads` brought to a target rank, with the same arguments;
        `offered` begins with the block that holds `tokens.start`, and `memory` with the first
        block of those that bytes landed in: the rank's pool, or staging.
        """
        plan = self._plan
        landing = plan.landing(rank, layers).layout
        size = plan.source.model.block_size
        larger = plan.offer_tokens // plan.unit_tokens
        starts = range(tokens.start, tokens.end, plan.unit_tokens)
        read = [
            read_units(plan, rank, layers, start // plan.unit_tokens % larger, self._turn)
            for start in starts
        ]
        first_ours, first_theirs = tokens.start // landing.block_size, tokens.start // size
        ours = [landing_blocks[start // landing.block_size - first_ours] for start in starts]
        pieces = in_memory(read, [block * landing.block_bytes for block in ours])
        expected: list[tuple[int, bytes | None]] = []
        labels: list[bytes] = []
        for start, placed in zip(starts, read, strict=True):
            theirs = offered[start // size - first_theirs]
            promised = self._promised(layers, start // size, theirs.digest)
            expected += [(start, promised.get(unit)) for unit in placed.units]
            labels += [self._label(start, theirs.ref, unit) for unit in placed.units]
        found = _digests(labels, hash_units(self._hash_key, memory, pieces))
        for at, (start, digest) in enumerate(expected):
            if found[at * HASH_BYTES : (at + 1) * HASH_BYTES] != digest:
                return start
        return None

    def _used_slots(self, number: int) -> int:
        """Return how many slots of the prompt's source block `number` hold tokens of it."""
        size = self._plan.source.model.block_size
        return min(size, self._tokens - number * size)

    def _promised(self, layers: LayerRange, number: int, digests: bytes) -> dict[Unit, bytes]:
        """Return what was offered for source block `number`, unit by unit; nothing if malformed."""
        units = units_of_block(self._plan, layers, self._used_slots(number), self._turn)
        if len(digests) != len(units) * HASH_BYTES:
            return {}
        starts = range(0, len(digests), HASH_BYTES)
        return {unit: digests[at : at + HASH_BYTES] for unit, at in zip(units, starts, strict=True)}

    def _label(self, start: int, ref: BlockRef, unit: Unit) -> bytes:
        """Return a hash of all that is bound to a unit that begins with token `start`."""
        header = _HEADER.pack(
            unit.layers.start,
            unit.layers.end,
            unit.heads.start,
            unit.heads.end,
            unit.slots.start,
            unit.slots.end,
            ref.block,
            ref.epoch,
        )
        return hash_bytes(self._prefixes[start // self._plan.unit_tokens], header)


def _digests(labels: Sequence[bytes], hashes: Digests) -> bytes:
    """Return the digests of units, end to end: label plus hash, as two 64-bit sums each."""
    sums: bytes = (np.frombuffer(b"".join(labels), "<u8") + hashes.view("<u8").ravel()).tobytes()
    return sums
