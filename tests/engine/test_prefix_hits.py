"""Which prompts begin where a known prefix ends, and what becomes of their blocks."""

from itertools import pairwise

import pytest

from baton.core.request import GenerateRequest, SamplingParams
from baton.engine.kv_events import BlockRemoved, BlockStored
from baton.engine.step import ChunkComputed


def memory(world):
    return world.scheduler.stats().roster.memory


def first_start(plans, seq) -> int:
    """Where the sequence's first chunk began."""
    return next(p.start for plan in plans for p in plan.sequences if p.seq_id == seq)


@pytest.mark.parametrize(
    ("prompt", "hit"), [(1, 0), (8, 0), (9, 8), (16, 8), (17, 16), (24, 16), (30, 24)]
)
@pytest.mark.parametrize("prefix_hash", ["xxh3_128", "sha256"])
def test_the_second_time_only_the_rest_is_computed(bench, fake, prompt, hit, prefix_hash):
    world = bench(20, prefix_hash=prefix_hash)
    request = fake.request(prompt, 3)
    seqs = []
    for wanted in (0, hit):
        seqs.append(world.submit(request))
        assert first_start(world.run(), seqs[-1]) == wanted
    assert world.output(seqs[0]) == world.output(seqs[1]) == fake.expected(request)[0]
    assert (memory(world).prompt_tokens, memory(world).cached_tokens) == (2 * prompt, hit)
    assert [e for e in world.events if isinstance(e, ChunkComputed)] == [
        ChunkComputed(seq, prompt) for seq in seqs
    ]


def test_without_the_cache_everything_is_computed_again(bench, fake):
    world = bench(20, prefix_cache=False)
    for _ in range(2):
        seq = world.submit(fake.request(30, 3))
        assert first_start(world.run(), seq) == 0
    assert memory(world).pool.cached == memory(world).cached_tokens == 0
    assert world.scheduler.drain_kv_events()[0].events == ()


def test_a_conversation_goes_on_where_the_last_turn_ended(bench, fake):
    world = bench(20)
    first = fake.request(20, 12)
    answer = fake.expected(first)[0]
    world.submit(first)
    world.run()
    prompt = (*first.prompt, *answer, 1, 2, 3)
    second = GenerateRequest(first.request_id, prompt, 4, SamplingParams(seed=0))
    seq = world.submit(second)
    # 31 tokens have KV: the last answer token was never fed back. 24 of them fill blocks.
    assert first_start(world.run(), seq) == 24
    assert world.output(seq) == fake.expected(second)[0]


def test_tenants_do_not_share(bench, fake):
    world = bench(20)
    starts = []
    for tenant in ("a", "b", "a", ""):
        seq = world.submit(fake.request(30, 2, tenant=tenant))
        starts.append(first_start(world.run(), seq))
    assert starts == [0, 0, 24, 0]


def test_running_sequences_share_blocks(bench, fake):
    world = bench(20)
    a = world.submit(fake.request(16, 20))
    world.step()
    b = world.submit(fake.request(30, 20))
    world.step()
    one, two = world.scheduler.blocks(a), world.scheduler.blocks(b)
    assert one[:2] == two[:2]
    assert not set(one[2:]) & set(two[2:])
    world.scheduler.release(a)
    world.run()
    assert world.output(b) == fake.expected(fake.request(30, 20))[0]


def test_what_was_computed_twice_at_once_is_kept_once(bench, fake):
    world = bench(20)
    seqs = [world.submit(fake.request(30, 20)) for _ in range(2)]
    world.step()
    one, two = (world.scheduler.blocks(seq) for seq in seqs)
    assert one[:3] == two[:3]
    assert one[3] != two[3]  # the partial last block is nobody else's
    assert memory(world).pool.used == 5
    world.run()
    for seq in seqs:
        assert world.output(seq) == fake.expected(fake.request(30, 20))[0]


def test_a_prompt_too_big_for_the_free_blocks_fits_with_its_hit(bench, fake):
    world = bench(5)
    a = world.submit(fake.request(17, 7))
    world.step()
    b = world.submit(fake.request(30, 2))  # 4 blocks, of which 2 are a's
    world.step()
    assert len(world.scheduler.blocks(b)) == 4
    world.run()
    assert world.output(a) == fake.expected(fake.request(17, 7))[0]
    assert world.output(b) == fake.expected(fake.request(30, 2))[0]


def test_a_chunk_that_only_the_hit_makes_small_enough_is_run(bench, request_of):
    world = bench(40, max_batch_tokens=16)
    world.submit(request_of(25, 1))
    world.run()
    for seed in range(1, 9):
        world.submit(request_of(1, 30, seed=seed))
        world.step()
    seq = world.submit(request_of(30, 1))  # 6 after the hit; the budget left is 8
    assert first_start([world.step()], seq) == 24


def test_preempted_sequences_find_their_own_blocks(bench, fake):
    world = bench(7, max_batch_tokens=64)
    requests = [fake.request(20, 16, seed=seed) for seed in (1, 2)]
    a, b = (world.submit(request) for request in requests)
    plans = world.run()
    assert world.scheduler.stats().roster.preemptions == 1
    starts = [p.start for plan in plans for p in plan.sequences if p.seq_id == b]
    again = next(start for before, start in pairwise(starts) if start <= before)
    assert again >= 16
    for seq, request in zip((a, b), requests, strict=True):
        assert world.output(seq) == fake.expected(request)[0]


def test_ends_are_evicted_before_beginnings(bench, fake):
    world = bench(4)
    world.scheduler.drain_kv_events()
    world.submit(fake.request(25, 1, seed=1))
    world.run()
    stored = world.scheduler.drain_kv_events()[0].events
    assert all(isinstance(event, BlockStored) for event in stored)
    assert [event.parent for event in stored[1:]] == [event.hash for event in stored[:-1]]
    world.submit(fake.request(9, 1, seed=2))
    world.run()
    removed = [
        e for e in world.scheduler.drain_kv_events()[0].events if isinstance(e, BlockRemoved)
    ]
    assert [event.hash for event in removed] == [stored[2].hash]
    seq = world.submit(fake.request(25, 1, seed=1))
    assert first_start(world.run(), seq) == 16


# Roles


def test_a_held_prompt_is_a_hit_once_it_is_released(bench, fake):
    world = bench(12)
    a = world.submit(fake.request(30, 5), hold=True)
    world.run()
    offered = world.scheduler.blocks(a)
    world.scheduler.release(a)
    b = world.submit(fake.request(30, 5), hold=True)
    world.run()
    assert world.scheduler.blocks(b)[:3] == offered[:3]
    assert world.output(a) == world.output(b)


def test_handed_over_blocks_are_a_hit_for_local_prompts_and_not_for_handovers(bench, fake):
    world = bench(20)
    request = fake.request(30, 3)
    for _ in range(2):
        seq = world.reserve(request)
        (reserved,) = world.scheduler.grant()
        assert len({ref.block for ref in reserved.blocks}) == 4
        assert memory(world).pool.used == 4
        world.admit(seq, request)
        world.run()
    seq = world.submit(request)
    assert first_start(world.run(), seq) == 24
    assert world.output(seq) == fake.expected(request)[0]


def test_what_a_failed_step_wrote_is_not_cached(bench, fake):
    world = bench(20, max_batch_tokens=16)
    a = world.submit(fake.request(30, 3))
    world.step()
    world.scheduler.fail_step(world.scheduler.plan())
    seq = world.submit(fake.request(30, 3))
    assert first_start(world.run(), seq) == 16
    assert world.output(a) == []


def test_a_reservation_is_granted_what_the_cache_has(bench, fake):
    world = bench(20)
    world.submit(fake.request(30, 3))
    world.run()
    request = fake.request(30, 3)
    seq = world.reserve(request)
    [granted] = world.scheduler.grant()
    assert (len(granted.blocks), granted.cached) == (4, 3)
    assert all(map(world.scheduler.is_current, granted.blocks))
    token = world.runner.hand_over(seq, granted.blocks, request, granted.cached)
    world.events.append(world.scheduler.admit(seq, token))
    world.run()
    assert world.output(seq) == fake.expected(request)[0]
    assert memory(world).cached_tokens == 24


def test_the_fence_keeps_only_what_reads_may_write(bench, fake):
    world = bench(20)
    world.submit(fake.request(30, 1))
    world.run()
    seq = world.reserve(fake.request(30, 1))
    [granted] = world.scheduler.grant()
    world.scheduler.fence(seq)
    assert memory(world).pool.fencing == 1
    assert [world.scheduler.is_current(ref) for ref in granted.blocks] == [True] * 3 + [False]
    world.scheduler.fence_passed(seq)
    assert memory(world).pool.fencing == memory(world).pool.used == 0
    world.scheduler.check()


def test_what_a_peer_reads_stays_when_the_cache_has_the_same(bench, fake):
    """Two handovers of one prompt: the cache keeps one; the other's may be read until it ends."""
    world = bench(20)
    seqs = [world.submit(fake.request(30, 1), hold=True) for _ in range(2)]
    plan = world.scheduler.plan()
    before = [world.scheduler.blocks(seq) for seq in seqs]
    assert {part.seq_id for part in plan.sequences} == set(seqs)
    world.scheduler.apply(world.runner.execute(plan))
    after = [world.scheduler.blocks(seq) for seq in seqs]
    assert after[1][:3] == after[0][:3] == before[0][:3] != before[1][:3]
    assert all(map(world.scheduler.is_current, before[1]))
    world.scheduler.check()
    world.scheduler.release(seqs[1])
    assert not any(map(world.scheduler.is_current, before[1]))
    world.scheduler.release(seqs[0])
    world.scheduler.check()


def test_the_outlook_of_a_prompt(bench, fake):
    world = bench(40, max_batch_tokens=16)
    assert world.scheduler.outlook(fake.request(30, 3)) == (30, 0, 0)
    world.submit(fake.request(30, 9))
    for _ in range(3):
        world.step()
    world.submit(fake.request(20, 3, seed=1))
    assert world.scheduler.outlook(fake.request(30, 3)) == (6, 20, 1)
    assert world.scheduler.outlook(fake.request(30, 3, tenant="other")) == (30, 20, 1)
    world.step()  # one token and a chunk of 8
    assert world.scheduler.outlook(fake.request(30, 3)) == (6, 12, 1)
    off = bench(40, prefix_cache=False)
    off.submit(fake.request(30, 1))
    off.run()
    assert off.scheduler.outlook(fake.request(30, 3)) == (30, 0, 0)


def test_what_is_adopted_serves_the_next_prompt(bench, fake):
    world = bench(20)
    request = fake.request(30, 3)
    head = GenerateRequest(request.request_id, request.prompt[:24], 1, SamplingParams())
    seq = world.reserve(head)
    [granted] = world.scheduler.grant()
    world.runner.hand_over(seq, granted.blocks, head)
    world.scheduler.adopt(seq)
    assert (memory(world).pool.used, memory(world).pool.cached) == (0, 3)
    seq = world.submit(request)
    assert first_start(world.run(), seq) == 24
    assert world.output(seq) == fake.expected(request)[0]


@pytest.mark.parametrize(("wanted", "held"), [(1, 1), (3, 3), (9, 3)])
def test_what_is_pinned_stays_until_it_is_released(bench, fake, wanted, held):
    world = bench(8)
    request = fake.request(30, 1)
    world.submit(request)
    world.run()
    pinned = world.scheduler.pin(request, wanted)
    blocks = world.scheduler.blocks(pinned)
    assert len(blocks) == held
    world.submit(fake.request(8 * (8 - held), 1, seed=1))  # needs all the rest
    world.run()
    assert all(map(world.scheduler.is_current, blocks))
    world.scheduler.check()
    world.scheduler.release(pinned)
    world.scheduler.check()
    assert memory(world).pool.used == 0
    assert world.scheduler.pin(fake.request(30, 1, tenant="other"), 3) is None
    assert world.scheduler.pin(request, 0) is None
    world.scheduler.check()


def test_what_a_running_sequence_has_is_pinned_in_its_place(bench, fake):
    world = bench(8)
    request = fake.request(20, 30)
    seq = world.submit(request)
    assert world.scheduler.pin_committed(seq) is None, "it has not begun"
    world.step()
    for _ in range(7):  # 27 tokens, of which 26 are computed: three blocks
        world.step()
    pinned = world.scheduler.pin_committed(seq)
    output = fake.expected(request)[0]
    assert pinned.request is request
    assert pinned.tokens == (*request.prompt, *output)[:25]
    assert pinned.blocks == world.scheduler.blocks(seq)[:3]
    world.scheduler.check()
    world.scheduler.release(seq)
    assert all(map(world.scheduler.is_current, pinned.blocks))
    world.submit(fake.request(8 * 5, 1, seed=1))  # needs all the rest
    world.run()
    assert all(map(world.scheduler.is_current, pinned.blocks))
    world.scheduler.release(pinned.seq_id)
    world.scheduler.check()
    assert memory(world).pool.used == 0
    assert world.scheduler.pin_committed(seq) is None, "it has ended"


def test_of_a_preempted_sequence_nothing_is_pinned(bench, fake):
    world = bench(8)
    world.submit(fake.request(24, 30))
    late = world.submit(fake.request(24, 30, seed=1))
    world.step()
    assert world.scheduler.pin_committed(late).blocks == world.scheduler.blocks(late)[:3]
    pinned = None
    while world.scheduler.stats().roster.preemptions == 0:
        world.step()
    assert world.scheduler.blocks(late) == ()
    pinned = world.scheduler.pin_committed(late)
    assert pinned is None
    world.scheduler.check()
