"""The messages of a handover, as both state machines see them; proto/ puts them on the wire.

 decode                                prefill
   │── Open(request, ticket, attempt) ──▶│  queues; no decode memory is held
   │◀──────────── Accepted(incarnation) ─│
   │◀─ Want(blocks) ─────────────────────│  perhaps: decode has KV of the prompt that prefill
   │── Offer(blocks, digests) ──────────▶│  lacks, and reading it is cheaper than computing it
   │◀─────────────────────────── Pulled ─│
   │◀─ Offer(layers, blocks, digests) ───│  after each group of layers of each chunk;
   │◀─ Offer(layers, blocks, digests) ───│  decode reads while prefill computes on
   │◀── Offer(blocks, digests, first) ───│  the last one carries the first token
   │── Received ────────────────────────▶│  unpins its blocks
(the stream's end, for any reason, gives everything back on both sides)
"""

from dataclasses import dataclass

from baton.core.ids import Attempt, BlockId, Epoch, Incarnation, InstanceId, Ticket
from baton.core.kv_layout import LayerRange
from baton.core.request import GenerateRequest, TokenLogprobs
from baton.core.sharded_layout import ShardedLayout

PROTOCOL_VERSION = 7
"""Both sides must speak the same version of the messages below, and of their digests."""


@dataclass(frozen=True, slots=True)
class BlockRef:
    """A block in somebody's pool, as it was when the reference was made."""

    block: BlockId
    epoch: Epoch


@dataclass(frozen=True, slots=True)
class Open:
    """Decode asks prefill to compute a prompt and to offer its KV."""

    version: int
    compatibility: str
    """Hash of what must be equal on both sides; see core/compatibility.py."""
    layout: ShardedLayout
    """How KV lies on decode's ranks; it may lie otherwise on prefill's."""
    decode_instance: InstanceId
    decode_incarnation: Incarnation
    ticket: Ticket
    attempt: Attempt
    request: GenerateRequest
    bytes_per_s: float = 0.0
    """How fast decode's last reads were; 0 if there were none. Offers are sized by it."""
    cached_blocks: int = 0
    """Blocks of the prompt, from the first, that decode's prefix cache has."""
    transports: tuple[bytes, ...] = ()
    """How prefill may read them: what Transport.metadata() gave on each of decode's ranks."""
    place_blocks: int = 0
    """Blocks in the pool of each of decode's ranks: see Accepted."""
    device_ways: tuple[str, ...] = ()
    """By which decode can read pools on devices straight into its own, as
    NegotiatedTransport.ways names them."""


@dataclass(frozen=True, slots=True)
class Accepted:
    """Prefill has queued the request; `transports` say how to read its memory."""

    incarnation: Incarnation
    layout: ShardedLayout
    """How KV lies on prefill's ranks."""
    transports: tuple[bytes, ...]
    """What Transport.metadata() gave on each of prefill's ranks: by stage, then by place along dp
    and ep, then by rank along tp."""
    place_blocks: int = 0
    """Blocks in the pool of each rank. Block b is number b % place_blocks at place
    b // place_blocks along dp and ep, where other ranks have other sequences."""
    direct: bool = False
    """Whether `transports` read pools on devices, by one of decode's ways: offers then name blocks
    there, which land in decode's pool on a device, and nothing passes through staging."""


@dataclass(frozen=True, slots=True)
class Want:
    """Prefill would read these blocks of the prompt from decode's cache: decode offers them."""

    attempt: Attempt
    first_block: int
    end_block: int
    """The first that is not wanted."""


@dataclass(frozen=True, slots=True)
class Pulled:
    """Prefill has read what it wanted, or gives it up; decode may unpin."""

    attempt: Attempt


@dataclass(frozen=True, slots=True)
class OfferedBlock:
    """A block that may be read, and the digests that its bytes must have."""

    ref: BlockRef
    digest: bytes
    """16 bytes for each unit of the block, end to end; see kv_transfer/digest.py."""


@dataclass(frozen=True, slots=True)
class FirstToken:
    """What the last offer carries so that decode can go on, and where prefill's time went."""

    token: int
    queue_s: float
    """From Open to the step that computed the first chunk."""
    compute_s: float
    """From there to the first token."""
    chunks: int
    """Steps that it took."""
    cached_tokens: int = 0
    """Prompt tokens that the prefix cache had."""
    logprobs: TokenLogprobs | None = None
    """Set if the request asked for them."""
    offer_s: float = 0.0
    """From the first token until the last offer was ready to be sent."""
    chunk_s: tuple[float, ...] = ()
    """When each chunk was computed, since the first step began; PARTS_TOLD of them at most."""


@dataclass(frozen=True, slots=True)
class Offer:
    """Blocks of a layer range of a chunk that are ready to be read.

    The layers of a range of blocks come in order and without gaps, before the next range begins.
    """

    attempt: Attempt
    index: int
    """Offers of an attempt are numbered from 0, without gaps."""
    layers: LayerRange
    first_block: int
    """Index in the prompt's block table of the first block offered."""
    blocks: tuple[OfferedBlock, ...]
    first: FirstToken | None = None
    """Set on the last offer only."""


@dataclass(frozen=True, slots=True)
class Refused:
    """Prefill cannot do it, or can no longer; the code is one of core/errors.py."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Received:
    """Decode has read and verified everything; prefill may unpin."""

    attempt: Attempt


@dataclass(frozen=True, slots=True)
class Abort:
    """Decode no longer wants it."""

    attempt: Attempt
    reason: str


ToPrefill = Open | Offer | Received | Abort
ToDecode = Accepted | Want | Pulled | Offer | Refused
