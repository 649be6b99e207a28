"""What of a step plan each place along ep computes."""

from baton.core.ids import BlockId, SeqId
from baton.core.request import SamplingParams
from baton.engine.step import BlockCopy, ScheduledSequence, StepPlan
from baton.executor.own_part import own_part


def sequence(seq_id: int, *blocks: int) -> ScheduledSequence:
    table = tuple(map(BlockId, blocks))
    return ScheduledSequence(SeqId(seq_id), (1,), 0, table, True, SamplingParams())


def copy(device: int, host: int) -> BlockCopy:
    return BlockCopy(BlockId(device), BlockId(host))


def test_each_place_gets_its_sequences_by_its_own_numbers_of_blocks() -> None:
    plan = StepPlan(
        4,
        (sequence(1, 10, 19), sequence(2, 3), sequence(3, 15)),
        swap_out=(copy(2, 1), copy(12, 5)),
        swap_in=(copy(11, 4),),
    )
    assert own_part(plan, 0, 10, 4) == StepPlan(4, (sequence(2, 3),), (copy(2, 1),))
    second = StepPlan(
        4, (sequence(1, 0, 9), sequence(3, 5)), swap_out=(copy(2, 1),), swap_in=(copy(1, 0),)
    )
    assert own_part(plan, 1, 10, 4) == second


def test_a_place_may_have_nothing_to_compute() -> None:
    assert own_part(StepPlan(0, (sequence(1, 0),)), 1, 10, 0).sequences == ()
