"""Who comes first, and that nobody waits for ever."""

import pytest

from baton.core.config import EngineConfig
from baton.engine.policy import OutputLengths, make_policy
from baton.engine.step import TokenSampled


def ended(world) -> list[int]:
    return [e.seq_id for e in world.events if isinstance(e, TokenSampled) and e.finish]


def test_fcfs_goes_by_arrival(request_of):
    policy = make_policy(EngineConfig())
    requests = [request_of(5, n, priority=-n % 3) for n in (9, 1, 5)]
    assert [policy.rank(r, i, hold=False) for i, r in enumerate(requests)] == [0, 1, 2]


def test_a_better_priority_goes_first(bench, request_of):
    world = bench(20, max_sequences=1, policy="priority")
    seqs = [world.submit(request_of(4, 2, seed=i, priority=p)) for i, p in enumerate([2, 0, -3, 0])]
    world.run()
    assert ended(world) == [seqs[2], seqs[1], seqs[3], seqs[0]]


def test_priority_is_nothing_to_other_policies(bench, request_of):
    world = bench(20, max_sequences=1)
    seqs = [world.submit(request_of(4, 2, seed=i, priority=-i)) for i in range(3)]
    world.run()
    assert ended(world) == seqs


@pytest.mark.parametrize(("policy", "levels"), [("priority", 2), ("sjf", 1)])
def test_no_more_than_so_many_later_arrivals_go_first(bench, request_of, policy, levels):
    world = bench(40, max_sequences=1, policy=policy, max_overtakes=12, max_waiting=64)
    world.submit(request_of(4, 2, seed=1))
    world.step()  # it occupies the only slot
    unlucky = world.submit(request_of(40, 200, seed=2, priority=1))
    for seed in range(3, 40):  # better ones keep coming
        world.submit(request_of(4, 1, seed=seed, priority=-1))
        world.step()
        if world.scheduler.blocks(unlucky):
            break
    else:
        pytest.fail("it starves")
    overtook = [seq for seq in ended(world) if seq > unlucky]
    assert 1 < len(overtook) <= 12 * levels


def test_shorter_jobs_go_first(bench, request_of):
    world = bench(40, max_sequences=1, policy="sjf")
    world.submit(request_of(4, 2, seed=9))
    world.step()
    long, short, middle = (
        world.submit(request_of(8, n, seed=i)) for i, n in enumerate([60, 3, 20], start=1)
    )
    world.run()
    assert ended(world)[1:] == [short, middle, long]


def test_what_requests_like_it_generated_counts_more_than_max_tokens(bench, request_of):
    world = bench(40, max_sequences=1, policy="sjf")
    stops = tuple(range(40))
    for seed in range(3):
        world.submit(request_of(20, 100, seed=seed, stop=stops))  # long limit, one token
    world.submit(request_of(2, 12, seed=8))
    world.run()
    first = world.submit(request_of(4, 30, seed=5))
    world.step()
    plain = world.submit(request_of(2, 12, seed=6))
    like_them = world.submit(request_of(18, 100, seed=7, stop=stops))
    world.run()
    assert ended(world)[4:] == [first, like_them, plain]


def test_output_lengths(request_of):
    lengths = OutputLengths()
    short, long = request_of(3, 50), request_of(100, 500)
    assert (lengths.expect(short), lengths.expect(long)) == (50, 500)
    lengths.observe(long, 300)
    assert lengths.expect(long) == 300
    assert lengths.expect(short) == 50  # 300 is known of others, and it may have 50
    lengths.observe(short, 10)
    assert (lengths.expect(short), lengths.expect(long)) == (10, 300)
    for _ in range(100):
        lengths.observe(long, 100)
    assert lengths.expect(long) == pytest.approx(100, abs=1)


def test_a_prompt_to_hand_over_is_as_long_as_its_prompt(request_of):
    policy = make_policy(EngineConfig(policy="sjf", max_batch_tokens=16))
    ranks = [policy.rank(request_of(n, 500), 0, hold=True) for n in (8, 800, 8000)]
    assert ranks == sorted(set(ranks))
    assert ranks[0] < policy.rank(request_of(8, 500), 0, hold=False)
