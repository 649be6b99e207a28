"""What an instance tells every gateway of itself: its load, and which blocks its cache has.

Only prediction is made of it: a gateway that hears nothing routes by its own counts.
"""

from dataclasses import dataclass

KEY_BYTES = 8
"""Of a block's chained hash (core/hashing.py), so many travel: the first ones. A hash stands for
the whole prefix up to its block, so parents need not travel; two of ten million prefixes have the
same key with a chance of 3 in a million, and the worst that it does is a wrong guess."""


@dataclass(frozen=True, slots=True)
class CacheTerms:
    """How an instance names blocks, and whether it computes prompts by choice."""

    block_size: int
    """Tokens per block."""
    hash_name: str
    """A key of core.hashing.DIGESTS; "" if it has no prefix cache."""
    local_prefill: bool
    """A decode instance that may compute a prompt itself where that is cheaper."""


@dataclass(frozen=True, slots=True)
class InstanceLoad:
    """What an instance has to do."""

    queued_tokens: int = 0
    """Of prompts that are to be computed, waiting or begun."""
    running: int = 0
    """Sequences that decode."""
    context_tokens: int = 0
    """That these have: what a step's attention reads."""
    free_tokens: int = 0
    """Room in the KV pool, cached blocks that nobody uses included."""


@dataclass(frozen=True, slots=True)
class BlockChanges:
    """What one partition's prefix cache gained and lost: the sum of some events, in order."""

    partition: int
    first: int
    """Number of the first event; the next changes go on where these end."""
    events: int
    complete: bool
    """The cache is told from its beginning: forget what was told of this partition before."""
    stored: bytes
    """Keys of KEY_BYTES bytes each, all different: what is there after the last event."""
    removed: bytes
    """Likewise: what is not."""
