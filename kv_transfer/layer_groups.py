"""After which layers of a chunk its KV is offered, so that reads hide behind the rest of it.

Small groups leave less to be read after the last layer, and cost more: each offer is a message,
a set of digests and a read. A group is as large as a read must be to be worth that.
"""

from baton.core.config import HandoverConfig
from baton.core.kv_layout import KVLayout


def min_offer_bytes(config: HandoverConfig, bytes_per_s: float) -> float:
    """Return how much KV an offer must have, if reads were measured at `bytes_per_s` (0: not)."""
    return max(config.min_read_kib * 1024, config.offer_cost_s * bytes_per_s)


def group_ends(layout: KVLayout, blocks: int, min_bytes: float) -> tuple[int, ...]:
    """Return the layers before which groups end, for a chunk that completes `blocks` blocks.

    Groups are of like size and have at least `min_bytes` each. The last one is left out: it ends
    with the chunk.
    """
    chunk_bytes = blocks * layout.block_bytes
    groups = layout.layers if min_bytes <= 0 else int(chunk_bytes // min_bytes)
    groups = max(1, min(groups, layout.layers))
    return tuple(-(-group * layout.layers // groups) for group in range(1, groups))
