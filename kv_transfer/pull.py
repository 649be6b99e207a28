"""Whether prefill reads from decode what it lacks of a prompt, rather than computing it again.

After a turn of a conversation decode has the KV of the answer, and prefill has not.
"""

from baton.core.config import HandoverConfig
from baton.core.kv_layout import KVLayout

_MESSAGES = 3
"""Want, Offer and Pulled."""


def blocks_to_pull(
    config: HandoverConfig,
    layout: KVLayout,
    *,
    here: int,
    there: int,
    bytes_per_s: float,
    token_s: float | None,
) -> range:
    """Return the blocks of the prompt to read from decode; an empty range if none.

    `here` and `there` are the blocks, from the first, that prefill's and decode's caches have.
    `token_s` is what computing a token takes, `bytes_per_s` how fast reads are; what was not
    measured yet (None, 0) is no reason to read.
    """
    lacking = range(here, max(here, there))
    if not token_s or bytes_per_s <= 0:
        return range(0)
    read_s = len(lacking) * layout.block_bytes / bytes_per_s + _MESSAGES * config.offer_cost_s
    return lacking if read_s < len(lacking) * layout.block_size * token_s else range(0)
