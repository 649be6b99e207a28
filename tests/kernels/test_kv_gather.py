import pytest
import torch

from baton.core.kv_layout import KVLayout, LayerRange
from baton.kernels.kv_gather import gather_kv


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn"])
def test_layers_of_scattered_blocks_lie_side_by_side(dtype: str) -> None:
    layout = KVLayout(layers=5, kv_heads=2, block_size=8, head_dim=4, dtype=dtype)
    pool = torch.randint(0, 256, (7 * layout.block_bytes,), dtype=torch.uint8)
    blocks = [6, 0, 3]
    found = gather_kv(pool, layout, torch.tensor(blocks), LayerRange(1, 4))
    assert found.shape == (3, 3 * layout.layer_bytes)
    for row, block in zip(found, blocks, strict=True):
        begin = block * layout.block_bytes + layout.layer_bytes
        assert row.equal(pool[begin : begin + 3 * layout.layer_bytes])
