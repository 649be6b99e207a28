"""What the scheduler does in cases that are worth a name; the rest is in the state machine."""

from types import SimpleNamespace

import pytest

from baton.core.config import EngineConfig
from baton.core.errors import InvalidConfig, InvalidRequest, Overloaded
from baton.core.instance_events import InstanceLoad
from baton.core.request import FinishReason
from baton.engine.scheduler import Scheduler
from baton.engine.step import ChunkComputed, Reserved, StepResult, TokenSampled


def shares(plan) -> list[tuple[int, int, int, bool]]:
    """(sequence, start, end, samples) of each part of a plan."""
    return [(part.seq_id, part.start, part.end, part.samples) for part in plan.sequences]


def roster(world):
    return world.scheduler.stats().roster


# One request


@pytest.mark.parametrize("prompt", [1, 7, 8, 9, 16, 37])
@pytest.mark.parametrize("max_tokens", [1, 2, 9, 20])
def test_output_is_that_of_the_model(bench, fake, prompt: int, max_tokens: int):
    world = bench(8, max_batch_tokens=16)
    request = fake.request(prompt, max_tokens)
    seq = world.submit(request)
    world.run()
    tokens, finish = fake.expected(request)
    assert world.output(seq) == tokens
    assert world.events[-1] == TokenSampled(seq, tokens[-1], finish)
    assert world.free == 8


def test_chunks_end_with_a_block_or_with_the_prompt(bench, request_of):
    world = bench(8, max_batch_tokens=20)
    seq = world.submit(request_of(37, 3))
    plans = world.run()
    assert [shares(plan) for plan in plans] == [
        [(seq, 0, 16, False)],
        [(seq, 16, 32, False)],
        [(seq, 32, 37, True)],
        [(seq, 37, 38, True)],
        [(seq, 38, 39, True)],
    ]
    chunks = [event for event in world.events if isinstance(event, ChunkComputed)]
    assert chunks == [ChunkComputed(seq, end) for end in (16, 32, 37)]


def test_the_sampled_token_has_the_position_after_the_chunk(bench, request_of):
    world = bench(8)
    world.submit(request_of(10, 3))
    assert [plan.sequences[0].end for plan in world.run()] == [10, 11, 12]


def test_a_stop_token_ends_it_at_once(bench, fake):
    request = fake.request(5, 30)
    tokens, _ = fake.expected(request)
    stop = tokens[4]
    world = bench(8)
    seq = world.submit(fake.request(5, 30, stop=(stop,)))
    world.run()
    wanted = tokens[: tokens.index(stop) + 1]
    assert world.output(seq) == wanted
    assert world.events[-1] == TokenSampled(seq, stop, FinishReason.STOP)
    assert world.free == 8


def test_entries_into_the_queue_are_numbered_and_the_oldest_is_told(bench, request_of):
    world = bench(8, max_sequences=1)
    assert (roster(world).entries, roster(world).oldest) == (0, None)
    for _ in range(3):
        world.submit(request_of(8, 1))
    assert (roster(world).entries, roster(world).oldest) == (3, 0)
    world.step()
    assert (roster(world).entries, roster(world).oldest) == (3, 1)
    world.run()
    assert (roster(world).entries, roster(world).oldest) == (3, None)


# Batches


def test_the_load_is_what_waits_what_decodes_and_what_is_free(bench, request_of):
    world = bench(20, max_batch_tokens=16, max_sequences=2, prefix_cache=False)
    assert world.scheduler.load() == InstanceLoad(free_tokens=160)
    world.submit(request_of(8, 9))
    world.step()
    world.submit(request_of(30, 3))
    world.submit(request_of(7, 3))
    assert world.scheduler.load() == InstanceLoad(37, 1, 9, 144)
    world.step()  # one decodes, and 8 tokens of the next prompt fit beside it
    load = world.scheduler.load()
    assert (load.queued_tokens, load.running, load.context_tokens) == (29, 1, 10)


def test_decodes_come_first_and_prompts_share_the_rest(bench, request_of):
    world = bench(20, max_batch_tokens=20)
    a = world.submit(request_of(4, 9, seed=1))
    world.step()
    b = world.submit(request_of(6, 9, seed=2))
    c = world.submit(request_of(30, 9, seed=3))
    d = world.submit(request_of(3, 9, seed=4))
    plan = world.step()
    assert plan is not None
    # 20 = 1 + 6 + 8 (13 are left, a block fits) and the 3 of d fit into the remaining 5.
    assert shares(plan) == [(a, 4, 5, True), (b, 0, 6, True), (c, 0, 8, False), (d, 0, 3, True)]
    assert plan.num_tokens == 18


def test_a_prompt_moves_in_every_step_even_if_all_other_slots_decode(bench, request_of):
    world = bench(40, max_batch_tokens=16, max_sequences=64)
    slots = roster(world).slots
    assert slots == 16 - 8 + 1
    for seed in range(slots - 1):
        world.submit(request_of(1, 30, seed=seed))
        world.step()
    long = world.submit(request_of(40, 2, seed=99))
    ends = []
    for _ in range(5):
        plan = world.step()
        assert plan is not None
        assert plan.num_tokens <= 16
        ends += [part.end for part in plan.sequences if part.seq_id == long]
    assert ends == [8, 16, 24, 32, 40]


def test_max_sequences_bounds_those_that_run(bench, request_of):
    world = bench(20, max_sequences=2)
    for seed in range(3):
        world.submit(request_of(2, 4, seed=seed))
    assert [len(plan.sequences) for plan in world.run()] == [2, 2, 2, 2, 1, 1, 1, 1]


def test_a_big_prompt_is_not_overtaken_by_a_small_one(bench, request_of):
    world = bench(4)
    first = world.submit(request_of(10, 8, seed=1))  # 3 blocks in the end
    world.step()
    big = world.submit(request_of(20, 2, seed=2))  # 3 blocks
    small = world.submit(request_of(2, 2, seed=3))  # 1 block
    order = [seq for plan in world.run() for seq, start, *_ in shares(plan) if start == 0]
    assert order == [big, small]
    assert first not in order


# Running out of blocks


def test_the_youngest_is_preempted_and_loses_no_token(bench, fake):
    world = bench(4, max_batch_tokens=32)
    requests = [fake.request(8, 16, seed=seed) for seed in (1, 2)]
    a, b = (world.submit(request) for request in requests)
    world.run()
    assert roster(world).preemptions > 0
    for seq, request in zip((a, b), requests, strict=True):
        assert world.output(seq) == fake.expected(request)[0]
    chunks = [event for event in world.events if isinstance(event, ChunkComputed)]
    assert chunks == [ChunkComputed(a, 8), ChunkComputed(b, 8)]
    finished = [e.seq_id for e in world.events if isinstance(e, TokenSampled) and e.finish]
    assert finished == [a, b]
    assert world.free == 4


def test_a_handed_over_sequence_is_recomputed_here_after_preemption(bench, fake):
    world = bench(4, max_batch_tokens=32)
    requests = [fake.request(16, 12, seed=seed) for seed in (1, 2)]
    seqs = [world.reserve(request) for request in requests]
    for reserved, request in zip(world.scheduler.grant(), requests, strict=True):
        world.admit(reserved.seq_id, request)
    world.run()
    assert roster(world).preemptions > 0
    for seq, request in zip(seqs, requests, strict=True):
        assert world.output(seq) == fake.expected(request)[0]
    assert not [event for event in world.events if isinstance(event, ChunkComputed)]


def test_the_only_running_one_waits_for_granted_blocks_and_keeps_its_own(bench, fake):
    world = bench(2)
    local, remote = fake.request(7, 9, seed=1), fake.request(8, 2, seed=2)
    a = world.submit(local)
    world.step()
    b = world.reserve(remote)
    assert [r.seq_id for r in world.scheduler.grant()] == [b]
    world.run()
    assert len(world.output(a)) == 2  # the KV of one more token than the prompt fits its block
    assert roster(world).running == 1
    world.scheduler.release(b)
    world.run()
    assert world.output(a) == fake.expected(local)[0]


def test_half_computed_prompts_never_block_each_other(bench, request_of):
    world = bench(10, max_batch_tokens=16)
    seqs = [world.submit(request_of(50, 1, seed=s), hold=True) for s in (1, 2)]
    world.run()
    # The first has all its 7 blocks; the second began none, though 3 were free.
    assert world.output(seqs[0])
    assert not world.scheduler.blocks(seqs[1])
    world.scheduler.release(seqs[0])
    world.run()
    assert world.output(seqs[1])


# Prefill role


def test_hold_ends_after_the_first_token_and_keeps_the_blocks(bench, fake):
    request = fake.request(10, 1)
    world = bench(4)
    seq = world.submit(request, hold=True)
    world.run()
    first = fake.expected(request)[0][0]
    assert world.events == [ChunkComputed(seq, 10), TokenSampled(seq, first, None)]
    blocks = world.scheduler.blocks(seq)
    assert len(blocks) == 2
    assert all(world.scheduler.is_current(ref) for ref in blocks)
    assert world.free == 2
    world.scheduler.release(seq)
    assert [world.scheduler.is_current(ref) for ref in blocks] == [True, False]  # full, partial
    assert world.free == 4
    world.scheduler.check()


def test_hold_ignores_stop_tokens_and_takes_only_the_prompts_blocks(bench, fake):
    request = fake.request(16, 10, stop=tuple(range(40)))
    world = bench(2)
    seq = world.submit(request, hold=True)
    world.run()
    assert world.events[-1] == TokenSampled(seq, fake.expected(request)[0][0], None)


def test_a_held_sequence_is_never_preempted(bench, fake):
    world = bench(4, max_batch_tokens=64)
    local = fake.request(8, 17, seed=1)
    a = world.submit(local)
    held = world.submit(fake.request(16, 4, seed=2), hold=True)
    world.run()
    assert roster(world).preemptions == 0
    assert len(world.scheduler.blocks(held)) == 2
    assert len(world.output(a)) == 9  # 16 tokens of KV and the one sampled from them
    world.scheduler.release(held)
    world.run()
    assert world.output(a) == fake.expected(local)[0]


def test_a_prompt_whose_chunks_are_on_offer_is_never_preempted(bench, fake):
    world = bench(6, max_batch_tokens=16)
    local = fake.request(15, 30, seed=1)
    a = world.submit(local)
    world.step()
    held = world.submit(fake.request(31, 4, seed=2), hold=True)
    world.step()
    offered = world.scheduler.blocks(held)
    assert len(offered) == 4
    world.run()  # in the next step but one, a lacks a block while `held` is half computed
    assert world.scheduler.blocks(held) == offered
    assert len(world.output(a)) == 2
    world.scheduler.release(held)
    world.run()
    assert world.output(a) == fake.expected(local)[0]


# Decode role


def test_a_reservation_gets_the_blocks_of_its_prompt(bench, request_of):
    world = bench(4)
    seq = world.reserve(request_of(16, 5))
    assert world.scheduler.blocks(seq) == ()
    assert world.scheduler.plan() is None
    (reserved,) = world.scheduler.grant()
    assert reserved == Reserved(seq, world.scheduler.blocks(seq))
    assert len(reserved.blocks) == 2
    assert world.scheduler.grant() == []
    assert world.scheduler.plan() is None


def test_grants_are_strictly_in_order(bench, request_of):
    world = bench(4)
    big, small = (world.reserve(request_of(n, 2)) for n in (20, 4))
    third = world.reserve(request_of(20, 2))
    fourth = world.reserve(request_of(4, 2))
    assert [r.seq_id for r in world.scheduler.grant()] == [big, small]
    world.scheduler.release(small)
    assert world.scheduler.grant() == []  # one block is free, and would do for the fourth
    world.scheduler.release(third)
    assert [r.seq_id for r in world.scheduler.grant()] == [fourth]


def test_no_reservation_overtakes_a_local_prompt(bench, request_of):
    world = bench(4)
    local = world.submit(request_of(8, 2))
    reserved = world.reserve(request_of(8, 2))
    assert world.scheduler.grant() == []
    world.step()
    assert world.output(local)
    assert [r.seq_id for r in world.scheduler.grant()] == [reserved]


def test_no_local_prompt_overtakes_a_reservation(bench, request_of):
    world = bench(4)
    world.reserve(request_of(8, 2))
    local = world.submit(request_of(8, 2))
    assert world.scheduler.plan() is None
    world.scheduler.grant()
    world.step()
    assert world.output(local)


def test_granted_sequences_take_slots(bench, request_of):
    world = bench(10, max_sequences=2)
    for seed in range(3):
        world.reserve(request_of(8, 2, seed=seed))
    first, second = world.scheduler.grant()
    world.scheduler.release(first.seq_id)
    assert len(world.scheduler.grant()) == 1
    assert roster(world).granted == 2
    assert second.blocks


@pytest.mark.parametrize(("max_tokens", "stop"), [(1, False), (5, True)])
def test_the_first_token_may_be_the_last(bench, fake, max_tokens: int, stop: bool):
    first = fake.expected(fake.request(8, 1))[0][0]
    request = fake.request(8, max_tokens, stop=(first,) if stop else ())
    world = bench(4)
    seq = world.reserve(request)
    world.scheduler.grant()
    reason = FinishReason.STOP if stop else FinishReason.LENGTH
    assert world.scheduler.admit(seq, first) == TokenSampled(seq, first, reason)
    assert world.free == 4
    assert not world.scheduler.has_work
    world.scheduler.release(seq)
    world.scheduler.check()


def test_admitting_what_was_not_granted_is_a_bug(bench, request_of):
    world = bench(4)
    seq = world.reserve(request_of(8, 2))
    with pytest.raises(AssertionError, match="not granted"):
        world.scheduler.admit(seq, 1)


def test_fenced_blocks_are_nobodys_until_the_fence_has_passed(bench, request_of):
    world = bench(2)
    seq = world.reserve(request_of(16, 1))
    (reserved,) = world.scheduler.grant()
    waiting = world.reserve(request_of(16, 1))
    world.scheduler.fence(seq)
    world.scheduler.release(seq)  # it has ended already: this frees nothing
    world.scheduler.fence(seq)
    assert roster(world).memory.pool.fencing == 2
    assert world.scheduler.grant() == []
    assert not any(world.scheduler.is_current(ref) for ref in reserved.blocks)
    world.scheduler.check()
    world.scheduler.fence_passed(seq)
    world.scheduler.fence_passed(seq)
    assert [r.seq_id for r in world.scheduler.grant()] == [waiting]
    world.scheduler.check()


def test_a_fence_with_nothing_to_guard_is_a_release(bench, request_of):
    world = bench(2)
    reserving = world.reserve(request_of(16, 1))
    queued = world.submit(request_of(8, 4))
    for seq in (reserving, queued):
        world.scheduler.fence(seq)
    assert not world.scheduler.has_work
    world.scheduler.fence_passed(queued)
    world.scheduler.check()
    assert world.free == 2


# A step under way


@pytest.mark.parametrize("how", ["release", "fence"])
def test_blocks_that_a_step_uses_return_when_it_ends(bench, request_of, how: str):
    world = bench(2)
    seq = world.submit(request_of(12, 4))
    plan = world.scheduler.plan()
    getattr(world.scheduler, how)(seq)
    waiting = world.reserve(request_of(16, 1))
    assert world.scheduler.grant() == []
    world.scheduler.check()
    assert world.free == 0
    assert world.scheduler.apply(world.runner.execute(plan)) == []
    assert [r.seq_id for r in world.scheduler.grant()] == [waiting]
    world.scheduler.check()


def test_an_admission_during_a_step_joins_the_next(bench, fake):
    world = bench(8)
    local, remote = fake.request(4, 6, seed=1), fake.request(9, 6, seed=2)
    a, b = world.submit(local), world.reserve(remote)
    plan = world.scheduler.plan()
    assert [r.seq_id for r in world.scheduler.grant()] == [b]
    world.admit(b, remote)
    world.events += world.scheduler.apply(world.runner.execute(plan))
    plan = world.step()
    assert plan is not None
    assert [part.seq_id for part in plan.sequences] == [a, b]
    world.run()
    assert world.output(a) == fake.expected(local)[0]
    assert world.output(b) == fake.expected(remote)[0]


def test_a_failed_step_ends_its_sequences_and_no_others(bench, fake):
    world = bench(8, max_batch_tokens=16)
    a, b, c = (world.submit(fake.request(8, 4, seed=s)) for s in (1, 2, 3))
    plan = world.scheduler.plan()
    assert plan is not None
    assert [part.seq_id for part in plan.sequences] == [a, b]
    world.scheduler.release(a)
    assert world.scheduler.fail_step(plan) == [b]
    world.scheduler.check()
    assert world.free == 8
    world.run()
    assert world.output(c) == fake.expected(fake.request(8, 4, seed=3))[0]


@pytest.mark.parametrize("ahead", [False, True])
def test_a_sequence_that_cannot_go_on_ends_alone(fake, ahead: bool):
    """Its token is not taken in, nor what was planned after it meanwhile."""
    scheduler = Scheduler(EngineConfig(block_size=8), 8, depth=2, ahead=ahead)
    lost, kept = (scheduler.submit(fake.request(8, 4, seed=seed)) for seed in (1, 2))
    first, second = scheduler.plan(), scheduler.plan()
    assert (second is not None) == ahead
    why = InvalidRequest("grammar", "a+", "one that can be followed")
    events = scheduler.apply(StepResult(first.step, {lost: 3, kept: 4}, failed={lost: why}))
    assert {event.seq_id for event in events} == {kept}
    scheduler.check()
    with pytest.raises(KeyError):
        scheduler.blocks(lost)
    if ahead:
        result = StepResult(second.step, {lost: 3, kept: 5}, failed={lost: why})
        assert {event.seq_id for event in scheduler.apply(result)} == {kept}
    scheduler.release(kept)
    scheduler.check()
    assert scheduler.stats().roster.memory.pool.used == 0


def test_steps_are_one_at_a_time_and_results_are_matched(bench, request_of):
    world = bench(8)
    world.submit(request_of(8, 4))
    with pytest.raises(AssertionError, match="no step"):
        world.scheduler.apply(StepResult(1, {}))
    plan = world.scheduler.plan()
    with pytest.raises(AssertionError, match="still under way"):
        world.scheduler.plan()
    with pytest.raises(AssertionError, match="not 2"):
        world.scheduler.apply(StepResult(plan.step + 1, {}))
    world.events += world.scheduler.apply(world.runner.execute(plan))
    world.run()


# Several steps under way


def test_the_chunks_of_a_prompt_follow_one_another_into_the_stages(bench, fake):
    world = bench(8, max_batch_tokens=16, depth=3)
    request = fake.request(40, 3)
    seq = world.submit(request)
    plans = [world.scheduler.plan() for _ in range(3)]
    chunks = [plan.sequences[0] for plan in plans]
    assert [(c.start, c.end, c.samples) for c in chunks] == [
        (0, 16, False),
        (16, 32, False),
        (32, 40, True),
    ]
    for plan in plans:
        world.events += world.scheduler.apply(world.runner.execute(plan))
        world.scheduler.check()
    world.run()
    assert world.output(seq) == fake.expected(request)[0]


def test_decodes_are_spread_over_the_steps(bench, fake):
    world = bench(32, depth=3)
    for seed in range(8):
        world.submit(fake.request(4, 9, seed=seed))
    world.step()
    plans = [world.scheduler.plan() for _ in range(3)]
    assert [len(plan.sequences) for plan in plans] == [3, 3, 2]
    assert len({part.seq_id for plan in plans for part in plan.sequences}) == 8


def test_a_decode_waits_for_its_token(bench, fake):
    world = bench(8, depth=2)
    world.submit(fake.request(4, 9))
    plan = world.scheduler.plan()
    assert world.scheduler.plan() is None
    world.scheduler.apply(world.runner.execute(plan))
    assert world.scheduler.plan() is not None
    assert world.scheduler.plan() is None


def test_what_a_step_under_way_computes_is_not_preempted(bench, fake):
    world = bench(2, depth=2, prefix_cache=False)
    a, b = (world.submit(fake.request(7, 5, seed=seed)) for seed in range(2))
    world.step()
    plans = [world.scheduler.plan(), world.scheduler.plan()]
    assert [[part.seq_id for part in plan.sequences] for plan in plans] == [[a], [b]]
    world.scheduler.apply(world.runner.execute(plans[0]))
    assert world.scheduler.plan() is None, "a lacks a block, and b cannot give its own yet"
    world.scheduler.apply(world.runner.execute(plans[1]))
    plan = world.scheduler.plan()
    assert [part.seq_id for part in plan.sequences] == [a]
    assert world.scheduler.stats().roster.preemptions == 1


# Refusals


def test_what_can_never_fit_is_refused_with_the_numbers(bench, request_of):
    world = bench(2)
    with pytest.raises(InvalidRequest, match=r"prompt: '17 tokens' .* at most 16"):
        world.submit(request_of(17, 1), hold=True)
    with pytest.raises(InvalidRequest, match=r"max_tokens: 8 .* at most 7 after 10 of prompt"):
        world.reserve(request_of(10, 8))
    assert not world.scheduler.has_work
    world.scheduler.check()


@pytest.mark.parametrize(("prompt", "max_tokens"), [(10, 7), (16, 1), (1, 16)])
def test_what_just_fits_is_served(bench, fake, prompt: int, max_tokens: int):
    world = bench(2)
    request = fake.request(prompt, max_tokens)
    seq = world.submit(request)
    world.run()
    assert world.output(seq) == fake.expected(request)[0]


def test_hold_does_not_count_max_tokens(bench, request_of):
    world = bench(2)
    world.submit(request_of(16, 1000), hold=True)
    assert world.run()


def test_too_many_waiting_are_refused(bench, request_of):
    world = bench(2, max_waiting=2)
    world.submit(request_of(4, 1))
    world.reserve(request_of(4, 1))
    for arrive in (world.submit, world.reserve):
        with pytest.raises(Overloaded, match="2 sequences wait"):
            arrive(request_of(4, 1))
    world.step()
    world.scheduler.grant()
    world.submit(request_of(4, 1))


def test_a_budget_below_one_block_is_refused():
    config = EngineConfig(block_size=32, max_batch_tokens=16)
    with pytest.raises(InvalidConfig, match=r"max_batch_tokens: 16 .* one block of 32"):
        Scheduler(config, 4)


# The checks can fail


@pytest.mark.parametrize(
    "damage",
    [
        lambda r: r.memory._parts[0]._pool.allocate(1),
        lambda r: r.memory._parts[0]._pool.release(r[1].blocks[:1]),
        lambda r: r.running.remove(r[1]),
        lambda r: setattr(r, "_granted", 1),
        lambda r: setattr(r[1], "computed", 1000),
        lambda r: setattr(r[1], "table", ()),
        lambda r: r[1].drop_blocks(),
        lambda r: r[1].extend(r[0].blocks),
    ],
)
def test_check_finds(bench, request_of, damage):
    world = bench(8)
    for seed in (0, 1):
        world.submit(request_of(8, 5, seed=seed))
    world.step()
    damage(world.scheduler._roster)
    with pytest.raises(AssertionError):
        world.scheduler.check()


def test_the_fake_finds_foreign_kv(bench, fake: SimpleNamespace):
    world = bench(8)
    world.submit(fake.request(8, 5))
    world.step()
    world.runner.memory.scribble(world.scheduler.blocks(0))
    with pytest.raises(AssertionError, match="written for 'late'"):
        world.step()
