"""The digest of an offered block: of its bytes, and of everything that says whose bytes they are.

A digest that matches proves that what was read is the KV of *this* prefix, for *this* model,
revision and layout, from *this* epoch of the block, offered under *this* ticket. xxh3_128 hashes
about as fast as memory can be read, and guards against accidents; it is not a signature. The
ticket is unguessable, so a foreign block cannot match by replay.
"""

import struct
from collections.abc import Sequence

from baton.core.handover import BlockRef
from baton.core.hashing import HASH_BYTES, Buffer, chain_hashes, hash_bytes
from baton.core.ids import Ticket
from baton.core.kv_layout import LayerRange

_HEADER = struct.Struct("<IIIQ")


class DigestKey:
    """What all digests of one attempt of one handover are bound to."""

    def __init__(
        self, *, compatibility: str, ticket: Ticket, prompt: Sequence[int], block_size: int
    ) -> None:
        assert len(ticket) == HASH_BYTES, "a ticket has 128 bits"
        self._root = hash_bytes(compatibility.encode(), ticket)
        self._prefixes = chain_hashes(prompt, block_size, self._root)

    @property
    def num_blocks(self) -> int:
        """Blocks of the prompt, the partial last one included."""
        return len(self._prefixes)

    def digest(self, index: int, ref: BlockRef, layers: LayerRange, data: Buffer) -> bytes:
        """Return the digest (16 bytes) of `layers` of the prompt's block number `index`.

        `ref` names the block in the pool of the side that offers it; `data` is the run's bytes,
        slots beyond the end of the prompt included: they travel too.
        """
        header = _HEADER.pack(layers.start, layers.end, ref.block, ref.epoch)
        return hash_bytes(self._prefixes[index], header, data)
