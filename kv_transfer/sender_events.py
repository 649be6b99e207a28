"""What the sender of a handover hears and what it has done: its events and its actions.

Each action that takes time ends in exactly one event; see sender.py for who follows whom.
"""

from dataclasses import dataclass

from baton.core.errors import BatonError
from baton.core.handover import Abort, BlockRef, FirstToken, Offer, Open, Received, ToDecode
from baton.core.ids import Attempt
from baton.core.kv_layout import LayerRange
from baton.core.request import TokenLogprobs

# --- events ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Opened:
    """The stream's first message."""

    message: Open
    cached_blocks: int = 0
    """Of the prompt, from the first, that the prefix cache has here."""
    token_s: float | None = None
    """What computing a token of a prompt takes here, if that was measured."""


@dataclass(frozen=True, slots=True)
class PullEnded:
    """What was read from decode is in the cache, or it is given up."""


@dataclass(frozen=True, slots=True)
class Started:
    """The engine has planned a chunk of the sequence."""

    cached_tokens: int = 0
    """Where the first chunk starts: KV up to there was in the prefix cache, and is in `blocks`."""
    blocks: tuple[BlockRef, ...] = ()
    """The prompt's block table."""


@dataclass(frozen=True, slots=True)
class Staged:
    """There is room for the prompt in staging: a page for each of its blocks, in order."""

    pages: tuple[BlockRef, ...]


@dataclass(frozen=True, slots=True)
class LayersReady:
    """KV of the layers before `layers`, of the prompt up to `end` tokens, is in the blocks."""

    end: int
    layers: int


@dataclass(frozen=True, slots=True)
class ChunkReady:
    """KV of the prompt up to `end` tokens is in `blocks`, its whole block table."""

    end: int
    blocks: tuple[BlockRef, ...]


@dataclass(frozen=True, slots=True)
class Sampled:
    """The first token."""

    token: int
    logprobs: TokenLogprobs | None = None
    """Set if the request asked for them."""


@dataclass(frozen=True, slots=True)
class PeerSaid:
    """A later message of the stream."""

    message: Offer | Received | Abort


@dataclass(frozen=True, slots=True)
class StreamEnded:
    """The stream is gone: the peer closed it, died, or was cut off."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The engine refused the prompt or lost it."""

    error: BatonError


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed; sent when `deadline` is reached."""


SenderEvent = (
    Opened
    | PullEnded
    | Started
    | Staged
    | LayersReady
    | ChunkReady
    | Sampled
    | PeerSaid
    | StreamEnded
    | Failed
    | Tick
)

# --- actions --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Submit:
    """Queue the prompt in the engine and hold its blocks; its events follow, or Failed."""

    message: Open


@dataclass(frozen=True, slots=True)
class Pull:
    """Read into the cache what decode offers; ends in PullEnded, however it goes."""

    offer: Offer


@dataclass(frozen=True, slots=True)
class Stage:
    """Ask for a page of staging for each of so many blocks; ends in Staged, Failed, or our end."""

    blocks: int


@dataclass(frozen=True, slots=True)
class Send:
    """Write a message to the stream."""

    message: ToDecode


@dataclass(frozen=True, slots=True)
class SendOffer:
    """Compute the blocks' digests and write an Offer with them to the stream.

    With pages, copy the blocks' layers there first, and offer those.
    """

    attempt: Attempt
    index: int
    layers: LayerRange
    first_block: int
    blocks: tuple[BlockRef, ...]
    first: FirstToken | None
    pages: tuple[BlockRef, ...] = ()
    """One for each of the blocks, where decode cannot read the blocks themselves."""


@dataclass(frozen=True, slots=True)
class Release:
    """Give the sequence's blocks and pages back."""


@dataclass(frozen=True, slots=True)
class End:
    """Close the stream; `outcome` is `ok` or the code of the error that ended it."""

    outcome: str


SenderAction = Submit | Pull | Stage | Send | SendOffer | Release | End
