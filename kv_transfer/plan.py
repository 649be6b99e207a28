"""The transfer plan: which bytes of which pool go where. Pure arithmetic, no I/O."""

from collections.abc import Sequence

from baton.core.ids import BlockId
from baton.core.kv_layout import KVLayout, LayerRange
from baton.kv_transfer.transport import Run


def plan_reads(
    layout: KVLayout,
    layers: LayerRange,
    source: Sequence[BlockId],
    target: Sequence[BlockId],
) -> list[Run]:
    """Return the runs that bring `layers` of each source block into the target block beside it.

    Both pools have the same layout; offsets and lengths are in bytes from the start of each pool.
    The runs cover every byte exactly once. Neighbours are not merged here: transports do that.
    """
    runs: list[Run] = []
    for theirs, ours in zip(source, target, strict=True):
        remote, length = layout.run(theirs, layers)
        local, _ = layout.run(ours, layers)
        runs.append(Run(local, remote, length))
    return runs
