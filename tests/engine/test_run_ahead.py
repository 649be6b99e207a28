"""Planning ahead of the last tokens changes when things happen, and nothing that comes out."""

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.core.request import FinishReason
from baton.engine.step import PENDING, StepPlan, TokenSampled

REQUESTS = st.lists(
    st.tuples(
        st.integers(0, 12),  # steps until it arrives
        st.integers(1, 30),  # tokens of its prompt
        st.integers(1, 30),  # tokens of its output
        st.booleans(),  # whether it may stop
        st.integers(0, 3),  # seed
        st.one_of(st.none(), st.none(), st.integers(1, 20)),  # steps until it is aborted
    ),
    min_size=1,
    max_size=6,
)


def run(world, depth: int, arrivals=(), aborts=()) -> int:
    """Keep `depth` steps under way until nothing moves; return how many there were in all."""
    plans: deque[StepPlan] = deque()
    waiting, aborts, steps = deque(arrivals), dict(aborts), 0
    ids: list[int] = []
    while True:
        while waiting and (waiting[0][0] <= steps or not world.scheduler.has_work):
            ids.append(world.submit(waiting.popleft()[1]))
        for index, seq in enumerate(ids):
            if aborts.get(index, steps) < steps:
                world.scheduler.release(seq)
        while len(plans) < depth and (plan := world.scheduler.plan()) is not None:
            plans.append(plan)
            world.scheduler.check()
        if not plans:
            assert not world.scheduler.has_work, "nothing moves"
            if not waiting:
                return steps
            continue
        steps += 1
        world.events += world.scheduler.apply(world.runner.execute(plans.popleft()))
        world.scheduler.check()
        assert steps < 2000, "it does not come to an end"


@settings(max_examples=150, deadline=None)
@given(
    requests=REQUESTS,
    blocks=st.integers(8, 20),
    depth=st.integers(2, 3),
    prefix_cache=st.booleans(),
    host_blocks=st.sampled_from([0, 8]),
)
def test_outputs_are_the_same_with_and_without(
    fake, requests, blocks: int, depth: int, prefix_cache: bool, host_blocks: int
):
    requests.sort(key=lambda request: request[0])
    made = [
        (at, fake.request(prompt, output, seed=seed, stop=(fake.STOP_TOKEN,) if stop else ()))
        for at, prompt, output, stop, seed, _ in requests
    ]
    aborts = {i: after for i, (*_, after) in enumerate(requests) if after is not None}
    worlds = []
    for ahead in (False, True):
        world = fake.Bench(
            blocks,
            depth=depth if ahead else 1,
            ahead=ahead,
            host_blocks=host_blocks,
            prefix_cache=prefix_cache,
            max_batch_tokens=24,
            max_sequences=4,
        )
        run(world, depth if ahead else 1, made, aborts)
        assert world.free == blocks
        assert not world.scheduler.has_work
        worlds.append(world)
    for index, (_, request) in enumerate(made):
        plain, ahead = (world.output(index) for world in worlds)
        output, _ = fake.expected(request)
        if index in aborts:
            assert ahead == output[: len(ahead)]
            assert plain == output[: len(plain)]
        else:
            assert plain == ahead == output


def test_the_next_step_is_planned_with_the_same_sequences(fake):
    world = fake.Bench(20, depth=2, ahead=True)
    seqs = [world.submit(fake.request(9, 6, seed=seed)) for seed in range(3)]
    first, second = world.scheduler.plan(), world.scheduler.plan()
    assert [part.seq_id for part in second.sequences] == seqs
    assert [part.tokens for part in second.sequences] == [(PENDING,)] * 3
    assert [part.start for part in second.sequences] == [9] * 3
    for plan in (first, second):
        world.events += world.scheduler.apply(world.runner.execute(plan))
    run(world, 2)
    assert world.scheduler.stats().steps == 6, "a step without anybody's token"


def test_a_limit_is_known_before_the_token_is(fake):
    world = fake.Bench(20, depth=2, ahead=True)
    world.submit(fake.request(8, 2))
    plans = [world.scheduler.plan(), world.scheduler.plan()]
    assert all(plans)
    world.events += world.scheduler.apply(world.runner.execute(plans[0]))
    assert world.scheduler.plan() is None
    world.events += world.scheduler.apply(world.runner.execute(plans[1]))
    assert world.events[-1].finish is FinishReason.LENGTH
    assert world.scheduler.stats().steps == 2


def stopping(fake, prompt: int):
    """A request that stops by its third token, which is the first of a block of its own."""
    request = fake.request(prompt, 11)
    return fake.request(prompt, 11, stop=(fake.expected(request)[0][2],))


def test_what_was_computed_after_a_stop_token_is_dropped_and_its_block_comes_back(fake):
    request = stopping(fake, prompt=6)  # the stop token is at position 8, in a second block
    world = fake.Bench(2, depth=2, ahead=True)
    seq = world.submit(request)
    plans = deque([world.scheduler.plan(), world.scheduler.plan()])
    while len(world.output(seq)) < 3:
        world.events += world.scheduler.apply(world.runner.execute(plans.popleft()))
        if (plan := world.scheduler.plan()) is not None:
            plans.append(plan)
    assert world.events[-1].finish is FinishReason.STOP
    (extra,) = plans
    assert extra.sequences[0].start == 8
    assert world.free == 0, "a step under way still writes the second block"
    events = world.scheduler.apply(world.runner.execute(extra))
    assert events == []
    assert world.free == 2
    assert world.scheduler.stats().roster.memory.pool.cached == 1, "only the first block is whole"
    world.scheduler.check()


def test_a_failed_step_ends_a_sequence_that_the_next_step_has_too(fake):
    world = fake.Bench(20, depth=2, ahead=True, max_batch_tokens=16)
    lost = world.submit(fake.request(8, 9))
    plans = [world.scheduler.plan(), world.scheduler.plan()]
    kept = world.submit(fake.request(8, 9, seed=1))
    assert world.scheduler.fail_step(plans[0]) == [lost]
    assert world.free == 18, "the next step still writes the blocks"
    assert world.scheduler.apply(world.runner.execute(_without(plans[1], lost))) == []
    run(world, 2)
    assert world.output(kept) == fake.expected(fake.request(8, 9, seed=1))[0]
    assert world.free == 20


def _without(plan: StepPlan, seq: int) -> StepPlan:
    return StepPlan(plan.step, tuple(s for s in plan.sequences if s.seq_id != seq))


def test_who_lacks_a_block_gets_one_though_everybody_is_always_in_a_step(fake):
    """The last in rank is left out of a plan, and then preempted."""
    world = fake.Bench(4, depth=2, ahead=True, prefix_cache=False, max_batch_tokens=32)
    requests = [fake.request(15, 8, seed=0), fake.request(9, 8, seed=1)]
    first, last = (world.submit(request) for request in requests)
    plans: deque[StepPlan] = deque()
    while not world.scheduler.stats().roster.preemptions:
        while len(plans) < 2 and (plan := world.scheduler.plan()) is not None:
            plans.append(plan)
        world.events += world.scheduler.apply(world.runner.execute(plans.popleft()))
    assert len(world.output(last)) < 5, "it was let go on as long as its own blocks had room"
    while plans:
        world.events += world.scheduler.apply(world.runner.execute(plans.popleft()))
    run(world, 2)
    assert [world.output(s) for s in (first, last)] == [fake.expected(r)[0] for r in requests]


def test_nobody_waits_for_a_block_until_a_prompt_of_a_later_rank_is_computed(fake):
    """It is preempted between two chunks, as if nothing were planned ahead."""
    world = fake.Bench(9, depth=2, ahead=True, prefix_cache=False, max_batch_tokens=16)
    requests = [fake.request(15, 20, seed=0), fake.request(50, 2, seed=1)]
    first, last = (world.submit(request) for request in requests)
    plans: deque[StepPlan] = deque()
    computed: list[StepPlan] = []
    while not world.scheduler.stats().roster.preemptions:
        while len(plans) < 2 and (plan := world.scheduler.plan()) is not None:
            plans.append(plan)
            computed.append(plan)
        world.events += world.scheduler.apply(world.runner.execute(plans.popleft()))
    ends = [part.end for plan in computed for part in plan.sequences if part.seq_id == last]
    assert ends == [8], "its only chunk was planned before anybody lacked a block"
    while plans:
        world.events += world.scheduler.apply(world.runner.execute(plans.popleft()))
    run(world, 2)
    assert [world.output(s) for s in (first, last)] == [fake.expected(r)[0] for r in requests]


def test_blocks_are_cached_while_later_steps_use_the_sequence(fake):
    world = fake.Bench(20, depth=2, ahead=True)
    world.submit(fake.request(8, 30))
    plans = deque([world.scheduler.plan(), world.scheduler.plan()])
    for _ in range(10):
        world.events += world.scheduler.apply(world.runner.execute(plans.popleft()))
        plans.append(world.scheduler.plan())
    assert world.scheduler.known_tokens(fake.request(17, 1)) == 8
    while plans:
        world.events += world.scheduler.apply(world.runner.execute(plans.popleft()))
    run(world, 2)
    assert sum(isinstance(event, TokenSampled) for event in world.events) == 30


def test_duplicates_are_exchanged_only_when_no_step_uses_them(fake):
    """Two of the same prompt compute the same KV side by side."""
    world = fake.Bench(20, depth=2, ahead=True)
    request = fake.request(12, 20)
    seqs = [world.submit(request) for _ in range(2)]
    run(world, 2)
    assert [world.output(seq) for seq in seqs] == [fake.expected(request)[0]] * 2
    pool = world.scheduler.stats().roster.memory.pool
    assert pool.cached == (12 + 20 - 1) // 8
    assert world.free == 20


def test_nothing_can_be_planned_ahead_of_a_step_that_has_ended(fake):
    with pytest.raises(AssertionError, match="planned ahead"):
        fake.Bench(20, depth=1, ahead=True)
