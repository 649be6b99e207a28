"""Every sequence of an engine, its place, and the slot that it holds; its blocks: partitions.py.

The scheduler decides what moves; each move is one method here, so that blocks, slots and places
change together or not at all.
"""

from dataclasses import dataclass

from baton.core.config import EngineConfig
from baton.core.errors import InvalidRequest, Overloaded
from baton.core.ids import SeqId
from baton.core.request import GenerateRequest
from baton.engine.kv_memory import MemoryStats
from baton.engine.partitions import Partitions
from baton.engine.policy import make_policy
from baton.engine.sequence import Phase, RankOrder, Sequence


@dataclass(frozen=True, slots=True)
class RosterStats:
    """Sequences by place, and blocks by state."""

    waiting: int
    """Queued, reserving or preempted."""
    entries: int
    """How often a sequence has entered the queue, since the start."""
    oldest: int | None
    """Which of these entries is the first of those that still wait."""
    granted: int
    running: int
    held: int
    slots: int
    """Sequences that may be granted or running at once."""
    preemptions: int
    """Since the start."""
    memory: MemoryStats


class Roster:
    """The places of all sequences; `waiting`, `running` and `memory` are there to be read."""

    def __init__(self, config: EngineConfig, memory: Partitions, *, slots: int) -> None:
        self._block_size = config.block_size
        self._max_waiting = config.max_waiting
        self._slots = slots
        self.memory = memory
        self.policy = make_policy(config)
        self._sequences: dict[SeqId, Sequence] = {}
        self.waiting = RankOrder()
        self.running = RankOrder()
        self._granted = 0
        self._held = 0
        self._leaving: dict[SeqId, Sequence] = {}
        self._arrivals = 0
        self._entries = 0
        self._preemptions = 0

    def __repr__(self) -> str:
        return f"<Roster {self.stats()}>"

    def __getitem__(self, seq_id: SeqId) -> Sequence:
        return self._sequences[seq_id]

    def find(self, seq_id: SeqId) -> Sequence | None:
        """Return a sequence, or None if it has ended."""
        return self._sequences.get(seq_id)

    def arrive(self, request: GenerateRequest, phase: Phase, *, hold: bool) -> Sequence:
        """Put a new sequence into the queue; Overloaded or InvalidRequest if refused."""
        self.expect_fits(request, hold=hold)
        rank = self.policy.rank(request, self._arrivals, hold=hold)
        tokens = list(request.prompt)
        seq = Sequence(SeqId(self._arrivals), request, hold, phase, tokens, rank)
        if len(self.waiting) >= self._max_waiting:
            raise Overloaded(f"{len(self.waiting)} sequences wait for the engine")
        self._arrivals += 1
        self._sequences[seq.seq_id] = seq
        self._enqueue(seq)
        return seq

    def expect_fits(self, request: GenerateRequest, *, hold: bool) -> None:
        """Raise InvalidRequest if the pool, even if it were empty, could not hold the request."""
        prompt_len, capacity = len(request.prompt), self.memory.capacity
        if prompt_len > capacity:
            raise InvalidRequest("prompt", f"{prompt_len} tokens", f"at most {capacity}")
        # The last token's KV is never read; with `hold` the first token is the last.
        start = request.output_start
        if not hold and start + request.max_tokens - 1 > capacity:
            allowed = f"at most {capacity - start + 1} after {start} of prompt"
            raise InvalidRequest("max_tokens", request.max_tokens, allowed)

    def run(self, seq: Sequence, budget: int) -> bool:
        """Queued → running, with all blocks for what it has, and for one more token if it needs it.

        False, and nothing has changed, if a slot or a block is lacking, or if `budget` tokens are
        too few for its first chunk.
        """
        tokens = min(len(seq.tokens) + 1, seq.max_kv_tokens)
        if not (self._has_slot and self.memory.take(seq, tokens, budget)):
            return False
        self.waiting.remove(seq)
        seq.phase = Phase.RUNNING
        self.running.add(seq)
        return True

    def grant(self, seq: Sequence) -> bool:
        """Reserving → granted, with exactly the blocks of the prompt, or nothing has changed.

        `seq.committed` says how many of them, from the first, the prefix cache had.
        """
        if not (self._has_slot and self.memory.take_prompt(seq)):
            return False
        self.waiting.remove(seq)
        seq.phase = Phase.GRANTED
        self._granted += 1
        return True

    def admit(self, seq: Sequence) -> None:
        """Granted → running: the prompt's KV is in the blocks."""
        assert seq.phase is Phase.GRANTED, f"{seq} is not granted"
        self._granted -= 1
        seq.phase = Phase.RUNNING
        seq.computed = seq.planned = seq.told = seq.prompt_len
        self.memory.admitted(seq)
        self.memory.commit(seq)
        self.running.add(seq)

    def adopt(self, seq: Sequence) -> None:
        """Granted → ended: the prompt's KV is in the blocks, and stays in the cache."""
        assert seq.phase is Phase.GRANTED, f"{seq} is not granted"
        seq.computed = seq.planned = seq.prompt_len
        self.memory.commit(seq)
        self.end(seq)

    def pin(self, request: GenerateRequest, blocks: int) -> Sequence | None:
        """Make a held sequence of what the cache has of a prompt's first `blocks` blocks."""
        tokens, turn = list(request.prompt), self._arrivals
        return self._held_of(
            Sequence(SeqId(turn), request, True, Phase.HELD, tokens, rank=turn), blocks
        )

    def _held_of(self, seq: Sequence, blocks: int) -> Sequence | None:
        self.memory.take_cached(seq, blocks)
        if not seq.blocks:
            return None
        self._arrivals += 1
        self._sequences[seq.seq_id] = seq
        self._held += 1
        return seq

    def pin_committed(self, seq: Sequence) -> Sequence | None:
        """Make a held sequence of what `seq` has in the prefix cache, with the token after that.

        None if that is nothing: it has not begun, or was preempted. Nothing is hashed again.
        """
        turn, tokens = self._arrivals, seq.tokens[: seq.committed * self._block_size + 1]
        held = Sequence(SeqId(turn), seq.request, True, Phase.HELD, tokens, rank=turn)
        held.hashes = seq.hashes[: seq.committed]
        return self._held_of(held, seq.committed)

    def hold(self, seq: Sequence) -> None:
        """Running → held: the slot is free, the blocks stay."""
        self.running.remove(seq)
        seq.phase = Phase.HELD
        self._held += 1

    def grow(self, seq: Sequence) -> bool:
        """Make room for one more token, from sequences of a later rank if need be.

        False if none of these has any: then it keeps its blocks and must sit this step out.
        """
        if seq.planned < len(seq.table) * self._block_size:
            return True
        while not self.memory.take_one(seq):
            victim = self.last_after(seq, in_steps=False)
            if victim is None:
                return False
            self._preempt(victim)
        return True

    def last_after(self, seq: Sequence, *, in_steps: bool) -> Sequence | None:
        """Return the last in rank that may be preempted for `seq`.

        Not one with `hold`: its blocks are on offer to a peer, and it never grows. Nor one of
        another partition. One that a step under way computes only with `in_steps`: its turn comes
        when it has been left out of a plan.
        """
        for other in self.running.last_first():
            if other is seq:
                return None
            if other.partition != seq.partition or other.hold:
                continue
            if in_steps or not other.in_steps:
                return other
        return None

    def fence(self, seq: Sequence) -> None:
        """Granted → ended, with blocks that reads may still write."""
        assert seq.phase is Phase.GRANTED, f"{seq} is not granted"
        self.memory.fence(seq)
        self.end(seq)

    def end(self, seq: Sequence) -> None:
        """Any place → ended; steps under way keep the blocks until the last `left_step`."""
        del self._sequences[seq.seq_id]
        match seq.phase:
            case Phase.QUEUED | Phase.RESERVING:
                self.waiting.remove(seq)
            case Phase.GRANTED:
                self._granted -= 1
            case Phase.RUNNING:
                self.running.remove(seq)
            case Phase.HELD:
                self._held -= 1
        seq.phase = Phase.ENDED
        if seq.in_steps:
            self._leaving[seq.seq_id] = seq
        else:
            self.memory.give_back(seq)

    def left_step(self, seq: Sequence) -> None:
        """One step less touches its blocks."""
        seq.in_steps -= 1
        if not seq.in_steps and self._leaving.pop(seq.seq_id, None) is not None:
            self.memory.give_back(seq)

    def in_steps(self) -> int:
        """Return in how many steps all sequences are, one step counted for each of its own."""
        return sum(s.in_steps for s in (*self._sequences.values(), *self._leaving.values()))

    def stats(self) -> RosterStats:
        """Return a snapshot."""
        return RosterStats(
            waiting=len(self.waiting),
            entries=self._entries,
            oldest=min((seq.entry for seq in self.waiting), default=None),
            granted=self._granted,
            running=len(self.running),
            held=self._held,
            slots=self._slots,
            preemptions=self._preemptions,
            memory=self.memory.stats(),
        )

    def check(self) -> None:
        """Assert that every block has the owners that it should and every sequence one place."""
        self.memory.check([*self._sequences.values(), *self._leaving.values()])
        assert len(self.running) + self._granted <= self._slots
        assert all(seq.in_steps for seq in self._leaving.values())
        self._check_places()

    def _check_places(self) -> None:
        places: dict[Phase, list[Sequence]] = {phase: [] for phase in Phase}
        for seq in self._sequences.values():
            places[seq.phase].append(seq)
            waits = seq.phase in {Phase.QUEUED, Phase.RESERVING}
            assert waits == (not seq.blocks), f"{seq} has {len(seq.blocks)} blocks"
            assert waits or not seq.swapped, f"{seq} runs and is in host memory"
        assert list(self.waiting) == sorted(
            places[Phase.QUEUED] + places[Phase.RESERVING], key=lambda seq: seq.place
        )
        assert list(self.running) == sorted(places[Phase.RUNNING], key=lambda seq: seq.place)
        assert len(places[Phase.GRANTED]) == self._granted
        assert len(places[Phase.HELD]) == self._held
        assert not places[Phase.ENDED]

    @property
    def _has_slot(self) -> bool:
        return len(self.running) + self._granted < self._slots

    def _preempt(self, seq: Sequence) -> None:
        """Running → queued, where its rank says; what it has is brought back or computed again."""
        self.running.remove(seq)
        self.memory.preempt(seq)
        seq.phase = Phase.QUEUED
        self._enqueue(seq)
        self._preemptions += 1

    def _enqueue(self, seq: Sequence) -> None:
        seq.entry = self._entries
        self._entries += 1
        self.waiting.add(seq)
