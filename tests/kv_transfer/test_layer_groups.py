import pytest

from baton.core.config import HandoverConfig
from baton.core.kv_layout import KVLayout
from baton.kv_transfer.layer_groups import group_ends, min_offer_bytes


@pytest.mark.parametrize(
    ("layers", "blocks", "min_layers", "ends"),
    [
        (8, 1, 1, (1, 2, 3, 4, 5, 6, 7)),
        (8, 1, 3, (4,)),  # two groups of four, and not 3 + 3 + 2
        (8, 4, 8, (2, 4, 6)),
        (8, 1, 9, ()),
        (7, 1, 2, (3, 5)),
        (1, 4, 0, ()),
        (3, 1, 0, (1, 2)),
        (8, 0, 1, ()),
    ],
)
def test_groups_are_of_like_size_and_large_enough(
    layers: int, blocks: int, min_layers: int, ends: tuple[int, ...]
) -> None:
    layout = KVLayout(layers, kv_heads=2, block_size=8, head_dim=4, dtype="float32")
    assert group_ends(layout, blocks, min_layers * layout.layer_bytes) == ends


def test_the_faster_the_link_the_larger_the_offer() -> None:
    config = HandoverConfig(min_read_kib=256, offer_cost_s=0.001)
    assert min_offer_bytes(config, 0.0) == 256 * 1024
    assert min_offer_bytes(config, 1e6) == 256 * 1024
    assert min_offer_bytes(config, 1e9) == 1e6
