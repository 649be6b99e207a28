"""One request inside the engine, and sequences in order of rank."""

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from operator import attrgetter

from baton.core.handover import BlockRef
from baton.core.ids import BlockId, SeqId
from baton.core.request import GenerateRequest, SamplingParams


class Phase(Enum):
    """Where a sequence is in its life.

    submit ──▶ QUEUED ◀──preempted── RUNNING ──▶ HELD (hold only) ──release──▶ ENDED
                  └──────blocks────────▶ ▲ └──────────finished──────────────────▶
    reserve ─▶ RESERVING ──grant──▶ GRANTED ──admit
    """

    QUEUED = "queued"
    """Waits for blocks and a slot to be computed here."""
    RESERVING = "reserving"
    """Waits for blocks and a slot to be handed over."""
    GRANTED = "granted"
    """Its blocks are being filled by a handover."""
    RUNNING = "running"
    """Takes part in steps."""
    HELD = "held"
    """Computed; its blocks are kept for the peer that reads them."""
    ENDED = "ended"
    """Known only to the step under way, if that writes its blocks."""


@dataclass(slots=True, eq=False)
class Sequence:
    """The scheduler's record of one request; only the scheduler changes it."""

    seq_id: SeqId
    request: GenerateRequest
    hold: bool
    phase: Phase
    tokens: list[int] = field(repr=False)
    """Prompt and output so far."""
    rank: int
    """Who is served first: the lowest; see engine/policy.py."""
    place: tuple[int, SeqId] = field(init=False)
    """What sequences are ordered by: rank, then arrival."""
    prompt_len: int = field(init=False)
    """Tokens that it arrived with: computed by chunks, or handed over."""
    output_start: int = field(init=False)
    """Where its output begins: below prompt_len if an instance that is gone generated some."""
    sampling: SamplingParams = field(init=False, repr=False)
    computed: int = 0
    """Tokens, from the first, whose KV is in the blocks."""
    planned: int = 0
    """Tokens, from the first, whose KV is in the blocks once the steps under way have ended."""
    committed: int = 0
    """Blocks, from the first, that are in the prefix cache: they are read, and never written."""
    hashes: list[bytes] = field(default_factory=list, repr=False)
    """Chained hashes of its full blocks, as far as they were needed; tokens never change."""
    cached_tokens: int | None = None
    """Prompt tokens that the prefix cache had when it first ran; None before."""
    told: int = 0
    """Prompt tokens told of as computed; a recomputation tells nothing twice."""
    entry: int = 0
    """Which entry into the queue its last was; they are counted from 0."""
    blocks: tuple[BlockRef, ...] = field(default=(), repr=False)
    table: tuple[BlockId, ...] = field(default=(), repr=False)
    """The ids in `blocks`, kept because every step needs them."""
    offered: tuple[BlockRef, ...] = field(default=(), repr=False)
    """Blocks that the cache's took the place of, while a peer may still be reading them."""
    partition: int | None = None
    """The part of the pool that its blocks are of; None before it has any."""
    swapped: int = 0
    """Tokens, from the first, whose KV is in host memory; only while it waits."""
    in_steps: int = 0
    """How many of the steps under way read and write its blocks."""
    pending: int = 0
    """Tokens after `tokens` that steps under way sample; counted only by who plans ahead."""
    twin: bool = False
    """The cache has another block with the KV of its first one that is not committed, and takes
    the place of that once no step uses it."""
    plain: bool = field(init=False)
    """Its sampling is `plain`: asked once, because every step needs to know."""
    sampled_at: tuple[int, int] = (-1, -1)
    """The last step in which it sampled, and the tokens that were computed after it."""

    def __post_init__(self) -> None:
        self.place = self.rank, self.seq_id
        self.prompt_len = len(self.request.prompt)
        self.output_start = self.request.output_start
        self.sampling = self.request.sampling
        self.plain = self.sampling.plain

    @property
    def generated(self) -> int:
        """Tokens generated so far, here or before it came here."""
        return len(self.tokens) - self.output_start

    @property
    def max_kv_tokens(self) -> int:
        """Tokens whose KV it can ever need: the last token's is never read."""
        return self.prompt_len if self.hold else self.output_start + self.request.max_tokens - 1

    def extend(self, blocks: tuple[BlockRef, ...]) -> None:
        """Append `blocks` to the block table."""
        self.blocks += blocks
        self.table += tuple(ref.block for ref in blocks)

    def replace(self, index: int, block: BlockRef) -> None:
        """Put `block` into the block table in place of one with the same KV."""
        blocks, table = list(self.blocks), list(self.table)
        blocks[index], table[index] = block, block.block
        self.blocks, self.table = tuple(blocks), tuple(table)

    def drop_blocks(self) -> tuple[BlockRef, ...]:
        """Forget the blocks and what was computed into them, and return them."""
        blocks, self.blocks, self.table = self.blocks, (), ()
        self.computed = self.planned = self.committed = 0
        self.twin = False
        return blocks

    def chunk_end(self, start: int, budget: int, block_size: int) -> int:
        """Return where a chunk of at most `budget` tokens from `start` ends.

        With a block or with all there is; at `start` if the budget is too small for either.
        """
        if len(self.tokens) - start <= budget:
            return len(self.tokens)
        return max(start, (start + budget) // block_size * block_size)


_place = attrgetter("place")


class RankOrder:
    """Sequences in order of rank, whatever order they are added in."""

    def __init__(self) -> None:
        self._sequences: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    @property
    def first(self) -> Sequence | None:
        """The one to be served next."""
        return self._sequences[0] if self._sequences else None

    def add(self, sequence: Sequence) -> None:
        """Put it where its rank says."""
        insort(self._sequences, sequence, key=_place)

    def remove(self, sequence: Sequence) -> None:
        """Take it out."""
        index = bisect_left(self._sequences, sequence.place, key=_place)
        assert self._sequences[index] is sequence
        del self._sequences[index]

    def last_first(self) -> Iterator[Sequence]:
        """Go through them from the last to be served."""
        return reversed(self._sequences)
