"""Preempted sequences in host memory: when, what is copied, and what may go wrong."""

import pytest

from baton.engine.step import BlockCopy


def swap(world):
    return world.scheduler.stats().roster.memory.swap


@pytest.fixture
def crowd(bench, fake):
    """Two sequences that outgrow a pool, and steps until one of them is preempted."""

    def make(host_blocks: int = 8, **config):
        options = {"max_batch_tokens": 64, "swap_block_cost": 0.5, "prefix_cache": False}
        world = bench(7, host_blocks=host_blocks, **(options | config))
        requests = [fake.request(20, 16, seed=seed) for seed in (1, 2)]
        seqs = [world.submit(request) for request in requests]
        while not world.scheduler.stats().roster.preemptions:
            plan = world.scheduler.plan()
            if not world.scheduler.stats().roster.preemptions:
                world.events += world.scheduler.apply(world.runner.execute(plan))
        return world, requests, seqs, plan

    return make


def finish(world, plan) -> list:
    world.events += world.scheduler.apply(world.runner.execute(plan))
    world.scheduler.check()
    return world.run()


def right(world, requests, seqs, fake) -> bool:
    return [world.output(s) for s in seqs] == [fake.expected(r)[0] for r in requests]


def test_what_was_computed_is_copied_out_and_back(crowd, fake):
    world, requests, seqs, plan = crowd()
    assert [part.seq_id for part in plan.sequences] == seqs[:1]
    assert len(plan.swap_out) == 3
    assert plan.swap_in == ()
    assert swap(world).used == 3
    plans = finish(world, plan)
    (back,) = [p for p in plans if p.swap_in]
    assert [copy.host for copy in back.swap_in] == [copy.host for copy in plan.swap_out]
    (part,) = [p for p in back.sequences if p.seq_id == seqs[1]]
    assert tuple(copy.device for copy in back.swap_in) == part.blocks[:3]
    assert len(part.tokens) == 1  # nothing is computed again
    assert right(world, requests, seqs, fake)
    assert (swap(world).used, swap(world).copied_out, swap(world).copied_in) == (0, 3, 3)


@pytest.mark.parametrize("config", [{"host_blocks": 0}, {"host_blocks": 2}, {"swap_block_cost": 4}])
def test_without_room_or_gain_it_is_computed_again(crowd, fake, config):
    world, requests, seqs, plan = crowd(**config)
    assert plan.swap_out == ()
    assert not any(p.swap_in for p in finish(world, plan))
    assert right(world, requests, seqs, fake)


def test_what_the_prefix_cache_still_has_is_not_copied_back(crowd, fake):
    world, requests, seqs, plan = crowd(prefix_cache=True)
    assert len(plan.swap_out) == 3
    (back,) = [p for p in finish(world, plan) if p.swap_in]
    assert 0 < len(back.swap_in) < 3
    assert right(world, requests, seqs, fake)


def test_nothing_is_granted_while_blocks_are_copied_out(crowd, fake):
    world, _, seqs, plan = crowd()
    world.scheduler.release(seqs[1])
    remote = world.reserve(fake.request(8, 1, seed=3))
    assert world.free > 1
    assert world.scheduler.grant() == []
    world.events += world.scheduler.apply(world.runner.execute(plan))
    assert [reserved.seq_id for reserved in world.scheduler.grant()] == [remote]


def test_copies_of_a_failed_step_are_worth_nothing(crowd, fake):
    world, requests, seqs, plan = crowd()
    assert world.scheduler.fail_step(plan) == seqs[:1]
    world.scheduler.check()
    assert swap(world).used == 0
    assert not any(p.swap_in for p in world.run())
    assert world.output(seqs[1]) == fake.expected(requests[1])[0]


def test_a_released_sequence_leaves_the_host(crowd):
    world, _, seqs, plan = crowd()
    world.scheduler.release(seqs[1])
    assert swap(world).used == 0
    finish(world, plan)
    assert not world.scheduler.has_work


@pytest.mark.parametrize(
    "damage",
    [
        lambda s: s._free.pop(),
        lambda s: s._held.clear(),
        lambda s: s._out.append(BlockCopy(0, 0)),
    ],
)
def test_check_finds(crowd, damage):
    world, *_ = crowd()
    world.scheduler.check()
    damage(world.scheduler._memory._parts[0]._swap)
    with pytest.raises(AssertionError):
        world.scheduler.check()
