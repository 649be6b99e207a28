import pytest

from baton.core.config import HandoverConfig
from baton.core.kv_layout import KVLayout
from baton.kv_transfer.pull import blocks_to_pull

CONFIG = HandoverConfig(offer_cost_s=0.001)


@pytest.mark.parametrize(
    ("here", "there", "bytes_per_s", "token_s", "pulled"),
    # A block has 8 tokens and 8192 bytes; three messages take 3 ms.
    [
        (1, 4, 8192e3, 0.001, range(1, 4)),  # 6 ms against 24
        (1, 4, 8192e3, 0.0002, range(0)),  # against 4.8
        (0, 1, 8192e3, 0.0004, range(0)),  # 4 ms against 3.2: messages are most of it
        (4, 4, 8192e3, 0.001, range(0)),
        (5, 4, 8192e3, 0.001, range(0)),
        (1, 4, 8192e3, None, range(0)),
        (1, 4, 0.0, 0.001, range(0)),
    ],
)
def test_blocks_are_read_where_that_is_faster(
    *, here: int, there: int, bytes_per_s: float, token_s: float | None, pulled: range
) -> None:
    layout = KVLayout(layers=4, kv_heads=2, block_size=8, head_dim=16, dtype="float32")
    assert layout.block_bytes == 8192
    found = blocks_to_pull(
        CONFIG, layout, here=here, there=there, bytes_per_s=bytes_per_s, token_s=token_s
    )
    assert list(found) == list(pulled)
