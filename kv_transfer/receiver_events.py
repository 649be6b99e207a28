"""What the receiver of a handover hears and what it has done: its events and its actions.

Each action that takes time ends in exactly one event; see receiver.py for who follows whom.
"""

from dataclasses import dataclass

from baton.core.errors import BatonError
from baton.core.handover import BlockRef, FirstToken, Offer, ToDecode, ToPrefill, Want
from baton.kv_transfer.plan import TokenRange, TransferPlan

# --- events ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PeerSaid:
    """A message of the stream."""

    message: ToDecode


@dataclass(frozen=True, slots=True)
class Connected:
    """The peer's memory can be read (or not: `error`)."""

    error: BatonError | None = None


@dataclass(frozen=True, slots=True)
class Granted:
    """Decode's pool has room: the blocks that the prompt will lie in, in order."""

    blocks: tuple[BlockRef, ...]
    cached: int = 0
    """How many of them, from the first, hold their KV already."""


@dataclass(frozen=True, slots=True)
class RankRead:
    """One rank's part of the read of an offer."""

    bytes: int
    seconds: float
    """From its begin until the last byte was there, on the rank's clock."""


@dataclass(frozen=True, slots=True)
class ReadEnded:
    """The read of an offer has ended, and nothing of it can write any more."""

    index: int
    bytes: int
    transport: str
    error: BatonError | None = None
    """WrongKV if the digests differ."""
    ranks: tuple[RankRead, ...] = ()
    """Each rank's part of it, by the rank's number; none if it failed."""


@dataclass(frozen=True, slots=True)
class StreamEnded:
    """The stream is gone."""

    error: BatonError


@dataclass(frozen=True, slots=True)
class CancelRequested:
    """Decode no longer wants it."""

    reason: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed; sent when `deadline` is reached."""


ReceiverEvent = PeerSaid | Connected | Granted | ReadEnded | StreamEnded | CancelRequested | Tick

# --- actions --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Send:
    """Write a message to the stream."""

    message: ToPrefill


@dataclass(frozen=True, slots=True)
class Connect:
    """Make the peer's memory readable; ends in Connected."""

    transports: tuple[bytes, ...]
    place_blocks: int
    """Both as Accepted has them."""
    plan: TransferPlan
    """How KV gets from there to here."""
    direct: bool = False
    """Whether it goes from device to device; as Accepted has it."""


@dataclass(frozen=True, slots=True)
class Reserve:
    """Ask decode's pool for the prompt's blocks; ends in Granted, or in nothing if we end first."""


@dataclass(frozen=True, slots=True)
class Read:
    """Read an offer into `blocks` and verify its digests; ends in ReadEnded.

    It has the offered blocks that decode lacks, one at least.
    """

    offer: Offer
    blocks: tuple[BlockRef, ...]
    """Decode's, from the one for the first of `tokens` on."""
    tokens: TokenRange
    """What decode lacks, and finds in the offered blocks."""


@dataclass(frozen=True, slots=True)
class Share:
    """Pin what the cache has of these blocks, and offer it to prefill."""

    want: Want


@dataclass(frozen=True, slots=True)
class Unshare:
    """Unpin it."""


@dataclass(frozen=True, slots=True)
class DropPeer:
    """Close the peer's endpoint by force, so that reads under way end: the fence of last resort."""


@dataclass(frozen=True, slots=True)
class Land:
    """The prompt's KV is all here and verified: admit the sequence."""

    first: FirstToken


@dataclass(frozen=True, slots=True)
class Fail:
    """The attempt has failed; the owner may try another way at once.

    With `fenced` unset, reads are still under way: the reserved blocks must be kept out of use
    until FencePassed.
    """

    error: BatonError
    fenced: bool


@dataclass(frozen=True, slots=True)
class FencePassed:
    """Nothing of this attempt can be read or written any more."""


ReceiverAction = (
    Send | Connect | Reserve | Read | Share | Unshare | DropPeer | Land | Fail | FencePassed
)
