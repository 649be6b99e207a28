"""What crosses from the scheduler to the executor and back, and what the scheduler then tells."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from baton.core.errors import InvalidRequest
from baton.core.handover import BlockRef
from baton.core.ids import BlockId, SeqId
from baton.core.request import FinishReason, GenerateRequest, SamplingParams, TokenLogprobs

PENDING = -1
"""In a plan, the token that the sequence's last step samples: the executor has it, or will have it
before this step, and the scheduler does not yet."""


@dataclass(frozen=True, slots=True)
class SamplingContext:
    """What choosing the next token needs to know of its sequence, if that is not `plain`."""

    prompt_len: int
    """Tokens in the user's prompt; all later ones are output."""
    stop_token_ids: tuple[int, ...]
    before: tuple[int, ...] | None
    """The sequence's tokens before those of this step. None if sampling does not look back, or if
    the sequence sampled in one of the last steps, as many as may be under way at once: then those
    are the tokens of that step and its own."""


class ScheduledSequence(NamedTuple):
    """One sequence's share of a step; a tuple, since hundreds of them are made per step."""

    seq_id: SeqId
    tokens: tuple[int, ...]
    """Tokens whose KV this step computes and writes; one for a decode, a chunk for a prefill.
    A decode's is PENDING if it is planned before the token is known."""
    start: int
    """Position of tokens[0] in the sequence; the KV of all positions before it is in the blocks."""
    blocks: tuple[BlockId, ...]
    """The block table, long enough for start + len(tokens)."""
    samples: bool
    """Whether the last token's logits give the next token."""
    sampling: SamplingParams
    context: SamplingContext | None = None
    """Set if the sequence samples and its parameters are not `plain`."""

    @property
    def end(self) -> int:
        """Position after the last token; the sampled token gets this position."""
        return self.start + len(self.tokens)


class BlockCopy(NamedTuple):
    """One block, copied whole between the two pools."""

    device: BlockId
    host: BlockId


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One ragged batch, and the copies to be made before it: first all out, then all in."""

    step: int
    sequences: tuple[ScheduledSequence, ...]
    swap_out: tuple[BlockCopy, ...] = ()
    """From device to host."""
    swap_in: tuple[BlockCopy, ...] = ()
    """From host to device."""

    @property
    def num_tokens(self) -> int:
        """Tokens in the batch."""
        return sum(len(s.tokens) for s in self.sequences)


@dataclass(frozen=True, slots=True)
class LayerWatch:
    """Who wants to know, while a step runs, how far down the layers its KV is written."""

    ends: tuple[int, ...]
    """Layers before which KV is waited for, in rising order."""
    reached: Callable[[int], object]
    """Called with each of `ends`, from the model's thread."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """The tokens sampled in a step, for the sequences with `samples` set."""

    step: int
    tokens: dict[SeqId, int]
    logprobs: dict[SeqId, TokenLogprobs] = field(default_factory=dict)
    """Of the sequences that asked for them."""
    unsound: tuple[SeqId, ...] = ()
    """Sequences whose logits were not finite: they have no token. The others' rows are their own,
    and so are none the worse for it."""
    failed: dict[SeqId, InvalidRequest] = field(default_factory=dict)
    """Sequences that end here because they ask for what cannot be done, and why; their tokens mean
    nothing."""


class Outlook(NamedTuple):
    """What a prompt would meet, were it to be computed now."""

    missing: int
    """Its tokens that the prefix cache lacks."""
    waiting: int
    """Tokens of other prompts that are to be computed before it."""
    running: int
    """Sequences that decode."""


class Pinned(NamedTuple):
    """Full blocks of a sequence, held in its place for whoever reads them."""

    seq_id: SeqId
    """Of who holds them: to be released."""
    request: GenerateRequest
    """What the sequence arrived with."""
    tokens: tuple[int, ...]
    """Those of the blocks, and the one after."""
    blocks: tuple[BlockRef, ...]


@dataclass(frozen=True, slots=True)
class ChunkComputed:
    """KV up to `end` tokens of a prompt is in its blocks now."""

    seq_id: SeqId
    end: int
    """Tokens of the prompt whose KV is computed, from 0."""


@dataclass(frozen=True, slots=True)
class TokenSampled:
    """A sequence has a new token; with `finish` it has ended."""

    seq_id: SeqId
    token: int
    finish: FinishReason | None
    logprobs: TokenLogprobs | None = None
    """Set if the request asked for them."""


@dataclass(frozen=True, slots=True)
class Reserved:
    """A reservation is granted: what is not cached may be read into its blocks now."""

    seq_id: SeqId
    blocks: tuple[BlockRef, ...]
    """The block table, exactly as long as the prompt needs."""
    cached: int = 0
    """How many of them, from the first, hold their KV already: the prefix cache had it."""


EngineEvent = ChunkComputed | TokenSampled | Reserved
