"""What ranks have room for, and what all of them have room for: agreed before any starts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Room:
    """How large a rank's pool can be, and which steps it can capture.

    Both must be the same on all ranks: blocks have one number everywhere, and a step that one rank
    replays and another launches would exchange different numbers of rows.
    """

    blocks: int
    """Of the KV pool."""
    sizes: tuple[int, ...] = ()
    """Batches for which steps of decodes are captured on a GPU, in rising order."""
    tokens: tuple[int, ...] = ()
    """Tokens for which steps with chunks of prompts are captured there but for attention, too."""

    def pack(self) -> list[Any]:
        """Return what `unpack` takes, of what msgpack carries."""
        return [self.blocks, list(self.sizes), list(self.tokens)]

    @classmethod
    def unpack(cls, packed: Sequence[Any]) -> "Room":
        """Return what was packed."""
        blocks, sizes, tokens = packed
        return cls(blocks, tuple(sizes), tuple(tokens))


def common_room(rooms: Sequence[Room]) -> Room:
    """Return what every one of the ranks has room for."""
    sizes = set(rooms[0].sizes).intersection(*(room.sizes for room in rooms))
    tokens = set(rooms[0].tokens).intersection(*(room.tokens for room in rooms))
    blocks = min(room.blocks for room in rooms)
    return Room(blocks, tuple(sorted(sizes)), tuple(sorted(tokens)))
