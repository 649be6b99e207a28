"""Any order of events, on pools so small that everything collides.

The memory is as hostile as the contract allows: a step executes, copies included, only when it is
applied, in the order of the plans; reads begin to write granted blocks at once, and late ones
scribble over fenced blocks just before their fence passes.
"""

import random
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from baton.core.errors import InvalidRequest, Overloaded
from baton.core.handover import BlockRef
from baton.core.request import FinishReason, GenerateRequest
from baton.engine.roster import RosterStats
from baton.engine.step import PENDING, ChunkComputed, ScheduledSequence, StepPlan, TokenSampled

DRAIN_STEPS = 3000


@dataclass
class Record:
    """What the test knows of one sequence."""

    request: GenerateRequest
    kind: str  # local, hold, remote
    tokens: list[int]
    finish: FinishReason
    output: list[int] = field(default_factory=list)
    told: int = 0
    state: str = "waiting"  # waiting, granted, going, ended
    blocks: tuple[BlockRef, ...] = ()
    cached: int = 0


def make_machine(fake):
    class Machine(RuleBasedStateMachine):
        @initialize(
            blocks=st.integers(2, 10),
            max_batch_tokens=st.integers(16, 40),
            max_sequences=st.integers(1, 5),
            max_waiting=st.integers(1, 8),
            prefix_cache=st.booleans(),
            host_blocks=st.sampled_from([0, 0, 2, 20]),
            policy=st.sampled_from(["fcfs", "priority", "sjf"]),
            max_overtakes=st.integers(1, 4),
            depth=st.integers(1, 3),
            ahead=st.booleans(),
            partitions=st.sampled_from([1, 1, 2, 3]),
        )
        def start(
            self, blocks: int, host_blocks: int, partitions: int, *, ahead: bool, **config: Any
        ) -> None:
            """`blocks` and `host_blocks` are those of one partition."""
            self.ahead = ahead and config["depth"] > 1
            self.world = fake.Bench(
                blocks * partitions,
                host_blocks=host_blocks * partitions,
                partitions=partitions,
                ahead=self.ahead,
                swap_block_cost=1.0,
                **config,
            )
            self.depth: int = config["depth"]
            self.partitions = partitions
            self.scheduler = self.world.scheduler
            self.total = blocks
            self.limits = config
            self.records: dict[int, Record] = {}
            self.fenced: dict[int, tuple[BlockRef, ...]] = {}
            self.plans: deque[StepPlan] = deque()
            self.failed: set[int] = set()
            self.grants = 0
            self.places: dict[int, tuple[int, int]] = {}

        # Arrivals

        @rule(
            kind=st.sampled_from(["local", "hold", "remote"]),
            prompt=st.integers(0, 40),
            max_tokens=st.integers(0, 40),
            seed=st.integers(0, 5),
            stop=st.booleans(),
            tenant=st.sampled_from(["", "a"]),
            priority=st.integers(-1, 1),
            period=st.sampled_from([8, 40]),
        )
        def arrive(
            self, kind: str, prompt: int, max_tokens: int, *, seed: int, stop: bool, **extra: Any
        ) -> None:
            prompt = 1 + prompt % (8 * self.total + 1)
            max_tokens = 1 + max_tokens % max(2, 8 * self.total - prompt + 2)
            stops = (fake.STOP_TOKEN, fake.STOP_TOKEN + 1) if stop else ()
            request = fake.request(prompt, max_tokens, seed=seed, stop=stops, **extra)
            need = prompt if kind == "hold" else prompt + max_tokens - 1
            waiting = sum(not self.scheduler.blocks(s) for s in self.live())
            try:
                if kind == "remote":
                    seq = self.world.reserve(request)
                else:
                    seq = self.world.submit(request, hold=kind == "hold")
            except InvalidRequest:
                assert need > 8 * self.total
            except Overloaded:
                assert waiting >= self.limits["max_waiting"]
            else:
                assert need <= 8 * self.total
                assert waiting < self.limits["max_waiting"]
                assert seq not in self.records
                self.records[seq] = Record(request, kind, *fake.expected(request))
                self.see_rank(seq)

        # Handover

        @rule()
        def grant(self) -> None:
            before = {seq: self.scheduler.blocks(seq) for seq in self.live()}
            taken = {ref.block for refs in before.values() for ref in refs}
            taken |= {ref.block for refs in self.fenced.values() for ref in refs}
            taken |= {b for plan in self.plans for part in plan.sequences for b in part.blocks}
            taken |= {copy.device for plan in self.plans for copy in plan.swap_out}
            for event in self.scheduler.grant():
                record = self.records[event.seq_id]
                assert record.kind == "remote"
                assert record.state == "waiting"
                self.grants += 1
                for other in self.live():
                    if self.places[other] < self.places[event.seq_id]:
                        assert self.scheduler.blocks(other), f"{other} was overtaken"
                assert len(event.blocks) == -(-len(record.request.prompt) // 8)
                assert event.cached * 8 < len(record.request.prompt)
                assert event.cached == 0 or self.limits["prefix_cache"]
                fresh = event.blocks[event.cached :]
                assert not taken & {ref.block for ref in fresh}
                assert all(self.scheduler.is_current(ref) for ref in event.blocks)
                taken |= {ref.block for ref in event.blocks}
                record.state, record.blocks = "granted", event.blocks
                record.cached = event.cached
                self.world.runner.memory.scribble(fresh)  # reads begin to land at once

        @precondition(lambda self: self.having("granted"))
        @rule(data=st.data())
        def admit(self, data: st.DataObject) -> None:
            self.admit_one(data.draw(st.sampled_from(self.having("granted"))))

        @precondition(lambda self: self.having("granted"))
        @rule()
        def admit_all(self) -> None:
            for seq in self.having("granted"):
                self.admit_one(seq)

        def admit_one(self, seq: int) -> None:
            record = self.records[seq]
            blocks, cached = record.blocks, record.cached
            token = self.world.runner.hand_over(seq, blocks, record.request, cached)
            record.state = "going"
            self.hear(self.scheduler.admit(seq, token))

        @precondition(lambda self: self.having("granted"))
        @rule(data=st.data())
        def adopt(self, data: st.DataObject) -> None:
            """What was handed over only goes to the cache."""
            seq = data.draw(st.sampled_from(self.having("granted")))
            record = self.records[seq]
            self.world.runner.hand_over(seq, record.blocks, record.request, record.cached)
            self.scheduler.adopt(seq)
            record.state = "ended"

        @precondition(lambda self: self.records)
        @rule(data=st.data(), blocks=st.integers(0, 4))
        def pin(self, data: st.DataObject, blocks: int) -> None:
            """A peer reads what the cache has."""
            known = self.records[data.draw(st.sampled_from(sorted(self.records)))]
            seq = self.scheduler.pin(known.request, blocks)
            if seq is not None:
                assert 0 < len(self.scheduler.blocks(seq)) <= blocks
                self.places[seq] = self.scheduler._roster[seq].place
                self.records[seq] = Record(known.request, "pin", [], known.finish, state="pinned")

        # Ends

        @precondition(lambda self: self.records)
        @rule(data=st.data())
        def release(self, data: st.DataObject) -> None:
            in_step = self.in_steps()
            self.release_one(data.draw(st.sampled_from(in_step or sorted(self.records))))

        def release_one(self, seq: int) -> None:
            refs = self.scheduler.blocks(seq) if seq in self.live() else ()
            self.scheduler.release(seq)
            self.records[seq].state = "ended"
            self.see_freed(seq, refs)

        @precondition(lambda self: self.records)
        @rule(data=st.data())
        def fence(self, data: st.DataObject) -> None:
            candidates = self.having("granted") or sorted(self.records)
            self.fence_one(data.draw(st.sampled_from(candidates)))

        def fence_one(self, seq: int) -> None:
            record = self.records[seq]
            if record.state == "granted":
                self.fenced[seq] = record.blocks[record.cached :]
            self.scheduler.fence(seq)
            record.state = "ended"
            assert not any(map(self.scheduler.is_current, self.fenced.get(seq, ())))

        @precondition(lambda self: self.fenced)
        @rule(data=st.data())
        def fence_passed(self, data: st.DataObject) -> None:
            self.pass_fence(data.draw(st.sampled_from(sorted(self.fenced))))

        def pass_fence(self, seq: int) -> None:
            self.world.runner.memory.scribble(self.fenced.pop(seq))
            self.scheduler.fence_passed(seq)

        # Steps

        @precondition(lambda self: len(self.plans) < self.depth)
        @rule()
        def begin(self) -> None:
            plan = self.scheduler.plan()
            if plan is None:
                return
            assert 0 < plan.num_tokens <= self.limits["max_batch_tokens"]
            assert len(plan.sequences) <= self.limits["max_sequences"]
            ids = [part.seq_id for part in plan.sequences]
            assert len(set(ids)) == len(ids)
            assert set(ids) <= set(self.live())
            sampling = [p.seq_id for before in self.plans for p in before.sequences if p.samples]
            assert self.ahead or not set(sampling) & set(ids), "planned before its token is known"
            copied = {copy.device for copy in plan.swap_in}
            for seq in self.live():
                theirs = {ref.block for ref in self.scheduler.blocks(seq)}
                assert not copied & theirs or seq in ids, f"copies into blocks of {seq}"
            self.plans.append(plan)
            for part in plan.sequences:
                assert len({block // self.total for block in part.blocks}) == 1
                record = self.records[part.seq_id]
                known = [*record.request.prompt, *record.output]
                known += [PENDING] * sampling.count(part.seq_id)
                assert len(known) < len(record.request.prompt) + record.request.max_tokens
                assert list(part.tokens) == known[part.start : part.end]
                assert part.samples == (part.end == len(known))
                assert part.samples or part.end % 8 == 0
                record.state = "going"
                self.see_written(part)

        @precondition(lambda self: self.plans)
        @rule()
        def end(self) -> None:
            plan = self.plans.popleft()
            # What follows on a failed step computes garbage, in blocks that are still its own.
            sound = tuple(part for part in plan.sequences if part.seq_id not in self.failed)
            result = self.world.runner.execute(replace(plan, sequences=sound))
            sampling = {p.seq_id for p in plan.sequences if p.samples} & set(self.live())
            events = self.scheduler.apply(result)
            assert {e.seq_id for e in events if isinstance(e, TokenSampled)} == sampling
            for event in events:
                self.hear(event)

        @rule(count=st.integers(2, 16))
        def go(self, count: int) -> None:
            """Many steps in a row, or random rules would seldom fill a pool."""
            for _ in range(count):
                self.grant()
                self.step()

        def step(self) -> None:
            """Plan all that may be under way at once, then end the oldest."""
            for _ in range(len(self.plans), self.depth):
                self.begin()
            if self.plans:
                self.end()

        @precondition(lambda self: self.plans)
        @rule()
        def fail(self) -> None:
            plan = self.plans.popleft()
            wanted = [p.seq_id for p in plan.sequences if p.seq_id in self.live()]
            assert self.scheduler.fail_step(plan) == wanted
            self.failed |= {part.seq_id for part in plan.sequences}
            for seq in wanted:
                self.records[seq].state = "ended"

        def hear(self, event: ChunkComputed | TokenSampled) -> None:
            record = self.records[event.seq_id]
            assert record.state == "going"
            length = len(record.request.prompt)
            if isinstance(event, ChunkComputed):
                assert record.kind != "remote"
                assert record.told < event.end <= length
                assert event.end % 8 == 0 or event.end == length
                record.told = event.end
                return
            assert record.kind == "remote" or record.told == length
            record.output.append(event.token)
            assert record.output == record.tokens[: len(record.output)]
            if record.kind == "hold":
                assert event.finish is None
                assert len(record.output) == 1
            elif record.output == record.tokens:
                assert event.finish is record.finish
                record.state = "ended"
            else:
                assert event.finish is None

        def see_rank(self, seq: int) -> None:
            """Ranks are static; ask for one once, and see that the handicap keeps its bound."""
            rank, arrival = place = self.scheduler._roster[seq].place
            assert arrival == seq
            levels = 2 if self.limits["policy"] == "priority" else 1
            bound = 0 if self.limits["policy"] == "fcfs" else self.limits["max_overtakes"] * levels
            assert abs(rank - seq) <= bound
            self.places[seq] = place

        # What always holds

        @invariant()
        def consistent(self) -> None:
            if hasattr(self, "scheduler"):
                self.scheduler.check()
                stats = self.scheduler.stats().roster
                assert stats.memory.pool.fencing == sum(map(len, self.fenced.values()))
                assert stats.granted == len(self.having("granted"))

        def see_freed(self, seq: int, refs: tuple[BlockRef, ...]) -> None:
            """Without the cache, blocks that nobody uses any more are stale at once."""
            if seq in self.in_steps():
                assert all(map(self.scheduler.is_current, refs))
            elif not self.limits["prefix_cache"]:
                assert not any(map(self.scheduler.is_current, refs))

        def see_written(self, part: ScheduledSequence) -> None:
            """What a step writes belongs to one sequence alone."""
            written = set(part.blocks[part.start // 8 : -(-part.end // 8)])
            assert written
            for other in self.live():
                if other != part.seq_id:
                    theirs = {ref.block for ref in self.scheduler.blocks(other)}
                    assert not written & theirs, f"{part} writes what {other} reads"

        def in_steps(self) -> list[int]:
            return [part.seq_id for plan in self.plans for part in plan.sequences]

        def live(self) -> list[int]:
            return [seq for seq, record in self.records.items() if record.state != "ended"]

        def having(self, state: str) -> list[int]:
            return [seq for seq, record in self.records.items() if record.state == state]

        def teardown(self) -> None:
            """Let the peers do what peers do: then everything ends, and nothing is left."""
            if not hasattr(self, "scheduler"):
                return
            for _ in range(DRAIN_STEPS):
                while self.plans:
                    self.end()
                for seq in sorted(self.fenced):
                    self.pass_fence(seq)
                for seq in self.having("granted"):
                    self.admit_one(seq)
                for seq in self.live():
                    record = self.records[seq]
                    if record.kind == "pin" or (record.kind == "hold" and record.output):
                        self.release_one(seq)
                if not self.live():
                    break
                before = self.grants
                self.grant()
                self.begin()
                assert self.plans or self.grants > before, "nothing moves"
            assert not self.live(), f"{self.live()} never ended"
            self.scheduler.check()
            stats = self.scheduler.stats().roster
            pool = stats.memory.pool
            assert pool.available == self.total * self.partitions
            assert pool.cached == 0 or self.limits["prefix_cache"]
            assert stats.memory.swap.used == 0
            assert (stats.waiting, stats.granted, stats.running, stats.held) == (0, 0, 0, 0)
            assert not self.scheduler.has_work

    return Machine


@pytest.mark.timeout(180)
def test_any_order_of_events(fake):
    run_state_machine_as_test(
        make_machine(fake),
        settings=settings(
            max_examples=150,
            stateful_step_count=60,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def soak(machine, rng: random.Random) -> RosterStats:
    """Drive a machine hard: few ends, many arrivals and steps; return what came of it."""
    machine.start(
        blocks=rng.randint(3, 12),
        max_batch_tokens=rng.randint(16, 60),
        max_sequences=rng.randint(2, 6),
        max_waiting=8,
        prefix_cache=rng.random() < 0.8,
        host_blocks=rng.choice([0, 3, 30]),
        policy=rng.choice(["fcfs", "priority", "sjf"]),
        max_overtakes=rng.randint(1, 8),
        depth=rng.randint(1, 3),
        ahead=rng.random() < 0.5,
        partitions=rng.choice([1, 1, 1, 2]),
    )
    for _ in range(250):
        match rng.choices(["arrive", "grant", "admit", "step", "end"], [3, 2, 4, 12, 1])[0]:
            case "arrive":
                kind = rng.choices(["local", "hold", "remote"], [3, 1, 3])[0]
                sizes = rng.randint(0, 30), rng.randint(10, 60)
                machine.arrive(
                    kind,
                    *sizes,
                    seed=rng.randint(0, 3),
                    stop=rng.random() < 0.2,
                    tenant=rng.choice(["", "", "a"]),
                    priority=rng.randint(-1, 1),
                    period=rng.choice([8, 40]),
                )
            case "grant":
                machine.grant()
            case "admit":
                if waiting := machine.having("granted"):
                    machine.admit_one(rng.choice(waiting))
            case "step":
                machine.step() if rng.random() < 0.8 or not machine.plans else machine.end()
            case "end":
                if live := machine.live():
                    end_one(machine, rng, rng.choice(live))
        machine.consistent()
    stats = machine.scheduler.stats().roster
    machine.teardown()
    return stats


def end_one(machine, rng: random.Random, seq: int) -> None:
    """End a sequence in one of the ways in which they end before their time."""
    if machine.plans and rng.random() < 0.1:
        machine.fail()
    elif machine.records[seq].state == "granted":
        machine.fence_one(seq)
    else:
        machine.release_one(seq)
    if machine.fenced and rng.random() < 0.5:
        machine.pass_fence(rng.choice(sorted(machine.fenced)))


def test_full_pools_for_a_long_time(fake):
    machine = make_machine(fake)
    ends = [soak(machine(), random.Random(seed)) for seed in range(60)]
    assert sum(end.preemptions > 0 for end in ends) > 30, "the pools were too roomy to prove much"
    assert sum(end.memory.cached_tokens > 0 for end in ends) > 30, "too few prefixes were shared"
    assert sum(end.memory.swap.copied_in > 0 for end in ends) > 15, "too few were swapped"
