"""A pool in parts: which one a sequence goes to, and that the parts share nothing."""

import pytest

from baton.core.config import EngineConfig
from baton.core.errors import InvalidConfig, InvalidRequest
from baton.engine.scheduler import Scheduler


def where(world, seq) -> int:
    """The partition in which a sequence has its blocks."""
    (found,) = {ref.block // 4 for ref in world.scheduler.blocks(seq)}
    return found


def test_sequences_spread_and_each_stays_in_one_part(bench, fake):
    world = bench(12, partitions=3)
    requests = [fake.request(9, 6, seed=seed) for seed in range(3)]
    seqs = [world.submit(request) for request in requests]
    world.step()
    assert sorted(where(world, seq) for seq in seqs) == [0, 1, 2]
    world.run()
    assert [world.output(seq) for seq in seqs] == [fake.expected(r)[0] for r in requests]


def test_a_prompt_goes_where_its_prefix_is(bench, fake):
    world = bench(12, partitions=3)
    for seed in range(3):
        world.submit(fake.request(17, 1, seed=seed))
    world.run()
    again = [world.submit(fake.request(17, 5, seed=seed), hold=True) for seed in (2, 0, 1)]
    world.run()
    assert [where(world, seq) for seq in again] == [2, 0, 1]
    assert world.scheduler.stats().roster.memory.cached_tokens == 3 * 16


def test_a_prefix_is_no_reason_to_wait_while_another_part_has_room(bench, fake):
    world = bench(8, partitions=2)
    busy = world.submit(fake.request(25, 7, seed=1))
    world.step()
    same = world.submit(fake.request(25, 7, seed=1))
    world.step()
    assert where(world, busy) != where(world, same)


def test_a_full_part_takes_nothing_from_another(bench, fake):
    world = bench(8, partitions=2, prefix_cache=False)
    long = [world.submit(fake.request(15, 18, seed=seed)) for seed in range(4)]
    for _ in range(8):
        world.step()
    assert world.scheduler.stats().roster.preemptions == 2
    world.run()
    for seed, seq in enumerate(long):
        assert world.output(seq) == fake.expected(fake.request(15, 18, seed=seed))[0]


def test_a_sequence_must_fit_one_part(bench, fake):
    world = bench(8, partitions=2)
    with pytest.raises(InvalidRequest, match="at most 32"):
        world.submit(fake.request(33, 1), hold=True)


def test_what_is_swapped_comes_back_to_its_part(bench, fake):
    world = bench(8, host_blocks=8, partitions=2, prefix_cache=False, swap_block_cost=0.1)
    requests = [fake.request(15, 18, seed=seed) for seed in range(4)]
    seqs = [world.submit(request) for request in requests]
    plans = world.run()
    out, back = (
        {(copy.device // 4, copy.host // 4) for plan in plans for copy in copies(plan)}
        for copies in (lambda plan: plan.swap_out, lambda plan: plan.swap_in)
    )
    assert out == back == {(0, 0), (1, 1)}
    assert [world.output(seq) for seq in seqs] == [fake.expected(r)[0] for r in requests]


@pytest.mark.parametrize(("blocks", "host", "field"), [(7, 4, "num_blocks"), (8, 5, "host_blocks")])
def test_parts_are_equal(blocks, host, field):
    with pytest.raises(InvalidConfig, match=f"{field}: .* a multiple of 2"):
        Scheduler(EngineConfig(), blocks, host_blocks=host, partitions=2)
