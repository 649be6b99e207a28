"""The digests of an offer: of its bytes, and of everything that says whose bytes they are.

A digest that matches proves that what was read is the KV of *this* prefix, for *this* model and
revision, between *these* layouts, of *these* layers and heads, from *this* epoch of the block,
offered under *this* ticket. Each unit (see units.py) has its own, so that a rank can check what it
read and nothing else. A digest covers bytes as they were read, scales included, before any
conversion, and slots beyond the end of the prompt where they travel.

The hash is xxh3_128. It hashes about as fast as memory can be read, several times faster than any
cryptographic hash, and 128 bits leave no room for chance: flipped bits, torn or late reads, and
blocks of other requests are found. It is no signature: who can choose the bytes of both sides can
make two that match. The ticket, which is unguessable and part of each digest, keeps a foreign
block from matching by replay; peers themselves are kept out by the transport's authentication.
"""

import struct
from collections.abc import Sequence

from baton.core.handover import BlockRef, OfferedBlock
from baton.core.hashing import HASH_BYTES, chain_hashes, hash_bytes
from baton.core.ids import Ticket
from baton.core.kv_layout import LayerRange
from baton.core.sharded_layout import Rank
from baton.kv_transfer.plan import TokenRange, TransferPlan
from baton.kv_transfer.units import PlacedUnit, Unit, held_units, read_units, units_of_block

_HEADER = struct.Struct("<7IQ")


class DigestKey:
    """Makes and checks the digests of one attempt of one handover."""

    def __init__(
        self, plan: TransferPlan, *, compatibility: str, ticket: Ticket, prompt: Sequence[int]
    ) -> None:
        assert len(ticket) == HASH_BYTES, "a ticket has 128 bits"
        root = hash_bytes(compatibility.encode(), plan.identity, ticket)
        self._plan = plan
        self._prefixes = chain_hashes(prompt, plan.unit_tokens, root)
        self._tokens = len(prompt)
        self._turn = plan.turn(ticket)

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
        digests = []
        for number, ref in enumerate(refs, first_block):
            begin = ref.block * block_bytes
            block = memory[begin : begin + block_bytes]
            held = held_units(plan, rank, layers, self._used_slots(number), self._turn)
            units = (
                self._digest(number * size + placed.unit.slots.start, ref, placed, block)
                for placed in held
            )
            digests.append(b"".join(units))
        return digests

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
        for start in range(tokens.start, tokens.end, plan.unit_tokens):
            ours = landing_blocks[start // landing.block_size - tokens.start // landing.block_size]
            block = memory[ours * landing.block_bytes : (ours + 1) * landing.block_bytes]
            theirs = offered[start // size - tokens.start // size]
            promised = self._promised(layers, start // size, theirs.digest)
            place = start // plan.unit_tokens % larger
            for placed in read_units(plan, rank, layers, place, self._turn):
                found = self._digest(start, theirs.ref, placed, block)
                if found != promised.get(placed.unit):
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

    def _digest(self, start: int, ref: BlockRef, placed: PlacedUnit, block: memoryview) -> bytes:
        """Return the digest (16 bytes) of the unit that begins with token `start` of the prompt."""
        unit = placed.unit
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
        data = (block[at : at + length] for at, length in placed.pieces)
        return hash_bytes(self._prefixes[start // self._plan.unit_tokens], header, *data)
