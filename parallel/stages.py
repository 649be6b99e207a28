"""Where a pipeline's stages begin, so that none has much more than the others."""

from collections.abc import Sequence
from itertools import accumulate


def balanced_stages(
    costs: Sequence[int], stages: int, *, first: int = 0, last: int = 0
) -> tuple[int, ...]:
    """Return the first layer of each stage but the first, for layers of the given costs.

    `first` and `last` are what the first and the last stage have beside their layers. Every stage
    has a layer at least, so that there are at most as many stages as layers. The costliest stage
    costs as little as can be, and of the ways to have that, the sum of squares is the least.
    """
    assert 1 <= stages <= len(costs), f"{stages} stages of {len(costs)} layers"
    sums = (0, *accumulate(costs))
    # best[end]: the borders of so many stages that together end before layer `end`, and their cost
    best: dict[int, tuple[int, int, tuple[int, ...]]] = {0: (0, 0, ())}
    for stage in range(stages):
        extra = (first if stage == 0 else 0) + (last if stage == stages - 1 else 0)
        found: dict[int, tuple[int, int, tuple[int, ...]]] = {}
        for end in range(stage + 1, len(costs) - (stages - 1 - stage) + 1):
            found[end] = min(
                (
                    max(worst, cost := sums[end] - sums[start] + extra),
                    squares + cost**2,
                    (*borders, start) if stage else (),
                )
                for start, (worst, squares, borders) in best.items()
                if start < end
            )
        best = found
    return best[len(costs)][2]
