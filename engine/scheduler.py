"""Which sequences run in the next step, with which tokens and blocks.

Everything waits in one queue in order of rank (with fcfs: of arrival): prompts to compute here,
reservations for prompts that are handed over, and sequences that were preempted. Only its head is
served, all or nothing, so nobody is overtaken by a smaller one.

Why something always moves, as long as handovers end: the first running sequence in rank takes the
block that it lacks from the last, so it finishes; a prompt gets all its blocks before its first
chunk, so no two half-computed prompts can wait for each other; and what cannot be preempted
(granted, held, fenced) waits for peers, never for this engine. Why everybody's turn comes: ranks
never change, and only so many who come later can have a better one (engine/policy.py).

Several steps may be under way at once, for models that are computed in stages: the stages are kept
busy if there are as many steps as stages. Every stage runs the steps in the order of their plans,
so a prompt's next chunk may be planned before the last one is computed; a decode has to wait for
its token. The sequences that decode are spread over the steps evenly.

Or, for a model that one device computes, steps are planned *ahead*: while step n runs, step n + 1
is planned with the same sequences, whose tokens the scheduler learns when n ends (PENDING):

    step n      n + 1                  n + 2
    … "def" ─▶  PENDING … " f" ──────▶ PENDING …        goes on
    … EOS ───▶  PENDING … dropped                       has ended with n; n + 1 computed for nothing

That a sequence is at its last token by its limit is known before, so only a stop token is learned
one step late. What was computed after it is never counted, told or cached, and its blocks are given
back when no step writes them any more.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from baton.core.config import EngineConfig
from baton.core.errors import InvalidConfig
from baton.core.handover import BlockRef
from baton.core.ids import SeqId
from baton.core.instance_events import InstanceLoad
from baton.core.request import GenerateRequest, TokenLogprobs
from baton.engine.kv_events import KVEvents
from baton.engine.partitions import Partitions
from baton.engine.roster import Roster, RosterStats
from baton.engine.sequence import Phase, Sequence
from baton.engine.step import (
    PENDING,
    ChunkComputed,
    EngineEvent,
    Outlook,
    Pinned,
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

    `plan` opens a step, `apply` or `fail_step` ends the oldest of those under way. All other
    methods may be called in between.
    """

    def __init__(
        self,
        config: EngineConfig,
        num_blocks: int,
        *,
        host_blocks: int = 0,
        depth: int = 1,
        partitions: int = 1,
        ahead: bool = False,
    ) -> None:
        """`host_blocks` are there for preempted sequences, in a pool of their own.

        Up to `depth` steps may be under way at once, with `ahead` of the same sequences. Both pools
        are cut into `partitions`, of which a sequence has one: see engine/partitions.py.
        """
        assert depth >= 1, depth
        assert depth > 1 or not ahead, "nothing is planned ahead of a step that has ended"
        if config.max_batch_tokens < config.block_size:
            allowed = f"at least one block of {config.block_size} tokens"
            raise InvalidConfig("max_batch_tokens", config.max_batch_tokens, allowed)
        self._block_size = config.block_size
        self._max_batch_tokens = config.max_batch_tokens
        # With every other slot decoding, a prompt still gets a chunk of one block in each step.
        slots = min(config.max_sequences, config.max_batch_tokens - config.block_size + 1)
        self._memory = Partitions(config, num_blocks, host_blocks, partitions)
        self._roster = Roster(config, self._memory, slots=slots)
        self._depth = depth
        self._ahead = ahead
        self._under_way: deque[tuple[StepPlan, list[Sequence]]] = deque()
        self._in_step: list[Sequence] = []
        """Of the step that is being planned."""
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
        if any(plan.swap_out for plan, _ in self._under_way):
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

    def pin_committed(self, seq_id: SeqId) -> Pinned | None:
        """Hold what a sequence has in the prefix cache, until `release`; None if that is nothing,
        or if it has ended.

        What is computed but not yet full is not part of it; nor is anything of one that waits.
        """
        seq = self._roster.find(seq_id)
        held = self._roster.pin_committed(seq) if seq else None
        if held is None:
            return None
        return Pinned(held.seq_id, held.request, tuple(held.tokens), held.blocks)

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
        assert len(self._under_way) < self._depth, f"step {self._steps} is still under way"
        batch: list[ScheduledSequence] = []
        prefilling = self._add_decodes(batch)
        self._add_chunks(batch, prefilling)
        if not batch:
            self._memory.no_step()
            return None
        self._steps += 1
        plan = StepPlan(self._steps, tuple(batch), *self._memory.step_copies())
        self._under_way.append((plan, self._in_step))
        self._in_step = []
        return plan

    def apply(self, result: StepResult) -> list[EngineEvent]:
        """End the oldest step: take in its tokens, and tell what came of it, in the plan's order.

        Of sequences that have ended meanwhile nothing is taken in, and those that failed end.
        """
        events: list[EngineEvent] = []
        size, ended = self._block_size, Phase.ENDED
        told, failed = result.logprobs, result.failed
        for part, seq in self._close_step(result.step, copied=True):
            if seq.phase is ended:
                continue
            if failed and seq.seq_id in failed:
                self._roster.end(seq)
                continue
            computed = seq.computed = part.end
            if computed // size > seq.committed and not (seq.twin and seq.in_steps):
                self._memory.commit(seq)
            prompt_end = min(computed, seq.prompt_len)
            if prompt_end > seq.told:
                seq.told = prompt_end
                events.append(ChunkComputed(seq.seq_id, prompt_end))
            if part.samples:
                if seq.pending:
                    seq.pending -= 1
                logprobs = told.get(seq.seq_id) if told else None
                events.append(self._append(seq, result.tokens[seq.seq_id], logprobs))
        return events

    def fail_unsound(self, result: StepResult) -> list[SeqId]:
        """End sequences of the oldest step for which no token would be right; before `apply`.

        Returns those that it ended, without those that were released meanwhile.
        """
        ended = []
        for seq_id in result.unsound:
            seq = self._roster.find(seq_id)
            if seq is not None:
                self._roster.end(seq)
                ended.append(seq_id)
        return ended

    def fail_step(self, plan: StepPlan) -> list[SeqId]:
        """End the oldest step, which raised: what its blocks hold is unknown, so its sequences end.

        Returns those that it ended, without those that were released meanwhile.
        """
        ended = []
        for _, seq in self._close_step(plan.step, copied=False):
            if seq.phase is not Phase.ENDED:
                self._roster.end(seq)
                ended.append(seq.seq_id)
        return ended

    # What there is

    def expect_fits(self, request: GenerateRequest) -> None:
        """Raise InvalidRequest if `submit` and `reserve` would, however empty the pool is."""
        self._roster.expect_fits(request, hold=False)

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

    def drain_kv_events(self) -> tuple[KVEvents, ...]:
        """Return what each partition's prefix cache gained and lost since the last call; for the
        router.
        """
        return self._memory.drain_events()

    def cached_hashes(self) -> tuple[Iterable[bytes], ...]:
        """Return the hashes of all prefixes that each partition's prefix cache has now."""
        return self._memory.cached_hashes()

    def load(self) -> InstanceLoad:
        """Return what there is to do; for the router."""
        running = list(self._roster.running)
        left = [len(seq.tokens) - seq.computed for seq in running]
        queued = [seq for seq in self._roster.waiting if seq.phase is Phase.QUEUED]
        decoding = [len(seq.tokens) for seq, n in zip(running, left, strict=True) if n <= 1]
        return InstanceLoad(
            queued_tokens=sum(len(seq.tokens) for seq in queued) + sum(n for n in left if n > 1),
            running=len(decoding),
            context_tokens=sum(decoding),
            free_tokens=self._memory.stats().pool.available * self._block_size,
        )

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
        assert len(self._under_way) <= self._depth
        assert not self._in_step
        in_steps = sum(len(sequences) for _, sequences in self._under_way)
        assert in_steps == self._roster.in_steps(), "a sequence counts its steps wrongly"
        assert self._ahead or not any(seq.pending for seq in self._roster.running)
        assert all(0 <= seq.pending <= seq.in_steps for seq in self._roster.running)

    # How

    def _add_decodes(self, batch: list[ScheduledSequence]) -> list[Sequence]:
        """Add one token of every sequence that decodes; return those that do not yet.

        A sequence decodes if its latest output token is all that is left to compute. This loop is
        most of what a step of a busy engine costs here: `_schedule` is written out in it.
        """
        prefilling = []
        running, size, share, ahead = Phase.RUNNING, self._block_size, self._share(), self._ahead
        in_step, add, grow = self._in_step, batch.append, self._roster.grow
        left_out: list[Sequence] = []
        for seq in tuple(self._roster.running):
            if seq.phase is not running:
                continue  # just preempted, for one of a better rank
            if left_out and seq in left_out:
                continue
            computed, tokens, pending = seq.planned, seq.tokens, seq.pending
            if computed < seq.prompt_len or computed != len(tokens) + pending - 1:
                prefilling.append(seq)
                continue
            if len(batch) == share:
                continue
            if seq.in_steps and (not ahead or computed == seq.max_kv_tokens):
                continue  # its token must be known first, or is its last
            if computed % size == 0 and not grow(seq):
                left_out += self._whom_to_leave_out(seq)
                continue
            seq.planned = computed + 1
            seq.in_steps += 1
            seq.pending += ahead
            in_step.append(seq)
            last, sampling = (PENDING if pending else tokens[-1],), seq.sampling
            context = None if seq.plain else self._context(seq, computed, computed + 1)
            add(ScheduledSequence(seq.seq_id, last, computed, seq.table, True, sampling, context))
        return prefilling

    def _whom_to_leave_out(self, seq: Sequence) -> list[Sequence]:
        """Return whom `seq`, which found no block, can preempt once it is in no step any more.

        If everybody were planned ahead, everybody would always be in a step.
        """
        victim = self._roster.last_after(seq, in_steps=True) if self._ahead else None
        return [] if victim is None else [victim]

    def _share(self) -> int:
        """Return how many sequences may decode in the next step: an equal share of all."""
        if self._depth == 1 or self._ahead:
            return -1  # there is no other step to leave any to, or it has them too
        decoding = sum(len(seq.tokens) > seq.prompt_len for seq in self._roster.running)
        return -(-decoding // self._depth)

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
        start = seq.planned
        end = seq.chunk_end(start, budget, self._block_size)
        if end <= start:
            return 0
        batch.append(self._schedule(seq, end))
        return end - start

    def _schedule(self, seq: Sequence, end: int) -> ScheduledSequence:
        start, seq.planned = seq.planned, end
        seq.in_steps += 1
        self._in_step.append(seq)
        samples = end == len(seq.tokens)
        if samples and not seq.hold:
            seq.pending += self._ahead
        return ScheduledSequence(
            seq_id=seq.seq_id,
            tokens=tuple(seq.tokens[start:end]),
            start=start,
            blocks=seq.table,
            samples=samples,
            sampling=seq.sampling,
            context=self._context(seq, start, end) if samples and not seq.plain else None,
        )

    def _context(self, seq: Sequence, start: int, end: int) -> SamplingContext:
        """Tell what sampling needs; the tokens so far only if the executor cannot know them."""
        before = None
        step, known = seq.sampled_at
        if seq.sampling.looks_back and (known != start or step <= self._steps - self._depth):
            before = tuple(seq.tokens[:start])
        seq.sampled_at = (self._steps + 1, end)
        return SamplingContext(seq.output_start, seq.request.stop_token_ids, before)

    def _close_step(
        self, step: int, *, copied: bool
    ) -> Iterator[tuple[ScheduledSequence, Sequence]]:
        """End the oldest step, give back what was released in it, and return its sequences."""
        assert self._under_way, "no step is under way"
        plan, sequences = self._under_way[0]
        assert plan.step == step, f"step {plan.step} is under way, not {step}"
        self._under_way.popleft()
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
