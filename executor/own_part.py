"""The part of a step plan that is of one place along the axes where attention is data-parallel."""

from collections.abc import Iterable
from dataclasses import replace

from baton.core.ids import BlockId
from baton.engine.step import BlockCopy, StepPlan


def own_part(plan: StepPlan, place: int, blocks: int, host_blocks: int) -> StepPlan:
    """Return the sequences and copies at a place, by the numbers of blocks in its own pools.

    `blocks` and `host_blocks` are in the pools of each place; see engine/partitions.py.
    """
    first = place * blocks
    sequences = tuple(
        s._replace(blocks=tuple(BlockId(block - first) for block in s.blocks))
        for s in plan.sequences
        if s.blocks[0] // blocks == place
    )

    def own(copies: Iterable[BlockCopy]) -> tuple[BlockCopy, ...]:
        return tuple(
            BlockCopy(BlockId(c.device - first), BlockId(c.host - place * host_blocks))
            for c in copies
            if c.device // blocks == place
        )

    return replace(
        plan, sequences=sequences, swap_out=own(plan.swap_out), swap_in=own(plan.swap_in)
    )
