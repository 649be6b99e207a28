"""Which sequences run in the next step, with which tokens and blocks.

Everything waits in one queue in order of rank (with fcfs: of arrival): prompts to compute here,
reservations for prompts that are handed over, and sequences that were preempted. Only its head is
served, all or nothing, so nobody is overtaken by a smaller one.

Why something always moves, as long as handovers end: the first running sequence in rank takes the
block that it lacks from the last, so it finishes; a prompt gets all its blocks before its first
chunk, so no two half-computed prompts can wait for each other; and what cannot be preempted
(granted, held, fenced) waits for peers, never for this engine. Why everybody's turn comes: ranks
never change, and only so many who come later can have a better one (engine/policy.py).
"""

from collections.abc import Iterator
from dataclasses import dataclass

from baton.core.config import EngineConfig
from baton.core.errors import InvalidConfig
from baton.core.handover import BlockRef
from baton.core.ids import SeqId
from baton.core.request import GenerateRequest, TokenLogprobs
from baton.engine.kv_events import KVEvents
from baton.engine.kv_memory import KVMemory
from baton.engine.roster import Roster, RosterStats
from baton.engine.sequence import Phase, Sequence
from baton.engine.step import (
    ChunkComputed,
    EngineEvent,
    Outlook,
    Reserved,
    SamplingContext,
    ScheduledSequence,
    StepPlan,
    StepResult,
    TokenSampled,
)
from baton.engine.stop import finish_reason


@dataclass(frozen=True, slots=True)
class SchedulerStats:
    """What there is now, and what was done since the start."""

    roster: RosterStats
    steps: int


class Scheduler:
    """The engine's state: events in, step plans and events out. No clock, thread or I/O.

    One step is under way at a time: `plan` opens it, `apply` or `fail_step` ends it. All other
    methods may be called in between.
    """

    def __init__(self, config: EngineConfig, num_blocks: int, *, host_blocks: int = 0) -> None:
        """`host_blocks` are there for preempted sequences, in a pool of their own."""
        if config.max_batch_tokens < config.block_size:
            allowed = f"at least one block of {config.block_size} tokens"
            raise InvalidConfig("max_batch_tokens", config.max_batch_tokens, allowed)
        self._block_size = config.block_size
        self._max_batch_tokens = config.max_batch_tokens
        # With every other slot decoding, a prompt still gets a chunk of one block in each step.
        slots = min(config.max_sequences, config.max_batch_tokens - config.block_size + 1)
        self._memory = KVMemory(config, num_blocks, host_blocks)
        self._roster = Roster(config, self._memory, slots=slots)
        self._under_way: StepPlan | None = None
        self._in_step: list[Sequence] = []
        self._steps = 0

    def __repr__(self) -> str:
        return f"<Scheduler step {self._steps}, {self._roster!r}>"

    # Arrivals

    def submit(self, request: GenerateRequest, *, hold: bool = False) -> SeqId:
        """Queue a prompt to be computed here.

        With `hold` it ends after its first token, whatever max_tokens and stop tokens say, and
        its blocks stay until `release`.

        Raises Overloaded if too many wait, InvalidRequest if it can never fit the pool.
        """
        return self._roster.arrive(request, Phase.QUEUED, hold=hold).seq_id

    def reserve(self, request: GenerateRequest) -> SeqId:
        """Queue a prompt whose KV will be handed over; `grant` gives it blocks.

        Raises Overloaded if too many wait, InvalidRequest if it can never fit the pool.
        """
        return self._roster.arrive(request, Phase.RESERVING, hold=False).seq_id

    def grant(self) -> list[Reserved]:
        """Give blocks to the reservations that now fit, strictly in order of rank.

        None while a step copies blocks to the host: a read into one of these would come too early.
        """
        granted: list[Reserved] = []
        if self._under_way is not None and self._under_way.swap_out:
            return granted
        while (head := self._roster.waiting.first) is not None:
            if head.phase is not Phase.RESERVING or not self._roster.grant(head):
                break
            granted.append(Reserved(head.seq_id, head.blocks, head.committed))
        return granted

    def admit(self, seq_id: SeqId, first_token: int) -> TokenSampled:
        """Let a granted sequence, whose KV has arrived and is verified, decode from the next plan.

        `first_token` is the one that prefill sampled; it may already finish the sequence.
        """
        seq = self._roster[seq_id]
        self._roster.admit(seq)
        return self._append(seq, first_token)

    def adopt(self, seq_id: SeqId) -> None:
        """End a granted sequence, whose KV has arrived and is verified; its full blocks stay."""
        seq = self._roster[seq_id]
        self._roster.adopt(seq)

    def pin(self, request: GenerateRequest, blocks: int) -> SeqId | None:
        """Hold what the prefix cache has of a prompt's first `blocks` blocks, until `release`.

        A peer may read them meanwhile. None if the cache has nothing.
        """
        seq = self._roster.pin(request, blocks)
        return seq.seq_id if seq else None

    # Ends

    def release(self, seq_id: SeqId) -> None:
        """End a sequence in any state; one that has ended is left alone.

        Its blocks are free at once, or at the end of the step that uses them.
        """
        seq = self._roster.find(seq_id)
        if seq is not None:
            self._roster.end(seq)

    def fence(self, seq_id: SeqId) -> None:
        """End a sequence; if it is granted, reads may go on writing until `fence_passed`.

        Reads are under way only from `grant` to `admit`: in any other state this is `release`.
        """
        seq = self._roster.find(seq_id)
        if seq is not None and seq.phase is Phase.GRANTED:
            self._roster.fence(seq)
        else:
            self.release(seq_id)

    def fence_passed(self, seq_id: SeqId) -> None:
        """Free the blocks that `fence` kept, if any: all reads into them have ended."""
        self._memory.fence_passed(seq_id)

    # Steps

    def plan(self) -> StepPlan | None:
        """Open a step: decodes first, then chunks of prompts; None if nothing can run now."""
        assert self._under_way is None, f"step {self._steps} is still under way"
        batch: list[ScheduledSequence] = []
        prefilling = self._add_decodes(batch)
        self._add_chunks(batch, prefilling)
        if not batch:
            self._memory.step_ended(copied=False)
            return None
        self._steps += 1
        self._under_way = StepPlan(self._steps, tuple(batch), *self._memory.step_copies())
        return self._under_way

    def apply(self, result: StepResult) -> list[EngineEvent]:
        """End the step: take in its tokens, and tell what came of it, in the plan's order."""
        events: list[EngineEvent] = []
        size, ended, told = self._block_size, Phase.ENDED, result.logprobs
        for part, seq in self._close_step(result.step, copied=True):
            if seq.phase is ended:
                continue
            computed = seq.computed = part.end
            if computed // size > seq.committed:
                self._memory.commit(seq)
            prompt_end = min(computed, seq.prompt_len)
            if prompt_end > seq.told:
                seq.told = prompt_end
                events.append(ChunkComputed(seq.seq_id, prompt_end))
            if part.samples:
                logprobs = told.get(seq.seq_id) if told else None
                events.append(self._append(seq, result.tokens[seq.seq_id], logprobs))
        return events

    def fail_step(self, plan: StepPlan) -> list[SeqId]:
        """End the step, which raised: what its blocks hold is unknown, so its sequences end too.

        Returns those that it ended, without those that were released meanwhile.
        """
        ended = []
        for _, seq in self._close_step(plan.step, copied=False):
            if seq.phase is not Phase.ENDED:
                self._roster.end(seq)
                ended.append(seq.seq_id)
        return ended

    # What there is

    def outlook(self, request: GenerateRequest) -> Outlook:
        """Return what a request would meet; asking changes nothing."""
        waiting = [seq for seq in self._roster.waiting if seq.phase is Phase.QUEUED]
        running = list(self._roster.running)
        left = [len(seq.tokens) - seq.computed for seq in running]
        return Outlook(
            missing=len(request.prompt) - self._memory.known_tokens(request),
            waiting=sum(len(seq.tokens) for seq in waiting) + sum(n for n in left if n > 1),
            running=sum(n == 1 for n in left),
        )

    def known_tokens(self, request: GenerateRequest) -> int:
        """Return how many tokens of a prompt, from the first, the prefix cache has now."""
        return self._memory.known_tokens(request)

    def blocks(self, seq_id: SeqId) -> tuple[BlockRef, ...]:
        """Return the block table of a sequence that has not ended (else KeyError)."""
        return self._roster[seq_id].blocks

    def is_current(self, ref: BlockRef) -> bool:
        """Whether the block has been used or cached without a break since `ref` was made."""
        return self._memory.is_current(ref)

    def drain_kv_events(self) -> KVEvents:
        """Return what the prefix cache gained and lost since the last call; for the router."""
        return self._memory.drain_events()

    @property
    def has_work(self) -> bool:
        """Whether anything runs or waits."""
        return len(self._roster.running) > 0 or len(self._roster.waiting) > 0

    def stats(self) -> SchedulerStats:
        """Return a snapshot."""
        return SchedulerStats(self._roster.stats(), self._steps)

    def check(self) -> None:
        """Assert that every block has exactly one owner and every sequence one place."""
        self._roster.check()
        assert (self._under_way is None) == (not self._in_step)

    # How

    def _add_decodes(self, batch: list[ScheduledSequence]) -> list[Sequence]:
        """Add one token of every sequence that decodes; return those that do not yet.

        A sequence decodes if its latest output token is all that is left to compute. This loop is
        most of what a step of a busy engine costs here: `_schedule` is written out in it.
        """
        prefilling = []
        running, size = Phase.RUNNING, self._block_size
        in_step, add, grow = self._in_step, batch.append, self._roster.grow
        for seq in tuple(self._roster.running):
            if seq.phase is not running:
                continue  # just preempted, for one of a better rank
            computed, tokens = seq.computed, seq.tokens
            if computed < seq.prompt_len or computed != len(tokens) - 1:
                prefilling.append(seq)
                continue
            if computed % size == 0 and not grow(seq):
                continue
            seq.in_step = True
            in_step.append(seq)
            last, sampling = (tokens[-1],), seq.sampling
            context = None if seq.plain else self._context(seq, computed + 1)
            add(ScheduledSequence(seq.seq_id, last, computed, seq.table, True, sampling, context))
        return prefilling

    def _add_chunks(self, batch: list[ScheduledSequence], prefilling: list[Sequence]) -> None:
        """Spend the rest of the token budget on prompts: begun ones, then waiting ones."""
        budget = self._max_batch_tokens - len(batch)
        for seq in prefilling:
            budget -= self._add_chunk(batch, seq, budget)
        while budget > 0 and (head := self._roster.waiting.first) is not None:
            if head.phase is not Phase.QUEUED or not self._roster.run(head, budget):
                break
            budget -= self._add_chunk(batch, head, budget)

    def _add_chunk(self, batch: list[ScheduledSequence], seq: Sequence, budget: int) -> int:
        """Add what the budget allows of `seq`; return how many tokens that is."""
        end = seq.chunk_end(seq.computed, budget, self._block_size)
        if end <= seq.computed:
            return 0
        batch.append(self._schedule(seq, end))
        return end - seq.computed

    def _schedule(self, seq: Sequence, end: int) -> ScheduledSequence:
        seq.in_step = True
        self._in_step.append(seq)
        samples = end == len(seq.tokens)
        return ScheduledSequence(
            seq_id=seq.seq_id,
            tokens=tuple(seq.tokens[seq.computed : end]),
            start=seq.computed,
            blocks=seq.table,
            samples=samples,
            sampling=seq.sampling,
            context=self._context(seq, end) if samples and not seq.plain else None,
        )

    def _context(self, seq: Sequence, end: int) -> SamplingContext:
        """Tell what sampling needs; the tokens so far only if the executor cannot know them."""
        before = None
        if seq.sampling.looks_back and seq.sampled_at != (self._steps, seq.computed):
            before = tuple(seq.tokens[: seq.computed])
        seq.sampled_at = (self._steps + 1, end)
        return SamplingContext(seq.prompt_len, seq.request.stop_token_ids, before)

    def _close_step(
        self, step: int, *, copied: bool
    ) -> Iterator[tuple[ScheduledSequence, Sequence]]:
        """End the step under way, give back what was released in it, and return its sequences."""
        plan, sequences = self._under_way, self._in_step
        assert plan is not None, "no step is under way"
        assert plan.step == step, f"step {plan.step} is under way, not {step}"
        self._under_way, self._in_step = None, []
        self._memory.step_ended(copied=copied)
        for seq in sequences:
            self._roster.left_step(seq)
        return zip(plan.sequences, sequences, strict=True)

    def _append(
        self, seq: Sequence, token: int, logprobs: TokenLogprobs | None = None
    ) -> TokenSampled:
        """Add a sampled token; end the sequence or hold it if that was its last here."""
        seq.tokens.append(token)
        finish = None
        if seq.hold:
            self._roster.hold(seq)
        else:
            finish = finish_reason(seq.request, seq.generated, token)
            if finish is not None:
                self._roster.policy.finished(seq.request, seq.generated)
                self._roster.end(seq)
        return TokenSampled(seq.seq_id, token, finish, logprobs)
