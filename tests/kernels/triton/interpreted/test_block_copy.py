import pytest
import torch

from baton.core.kv_layout import KVLayout, LayerRange
from baton.kernels.kv_gather import gather_by_kernel, gather_kv
from baton.kernels.triton.block_copy import gather_blocks, scatter_blocks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize(
    ("layers", "heads"),
    [(slice(0, 4), slice(0, 3)), (slice(1, 3), slice(0, 3)), (slice(2, 4), slice(1, 2))],
)
def test_parts_of_blocks_go_out_and_back(layers, heads, dtype):
    random = torch.Generator().manual_seed(0)
    shape = (6, 4, 2, 3, 16, 72)
    pool = torch.randn(shape, generator=random).to(dtype)
    blocks = torch.tensor([5, 0, -1, 3], dtype=torch.int32)
    part = pool[:, layers, :, heads]
    staged = torch.zeros(4, *part.shape[1:]).to(dtype)
    gather_blocks(part, blocks, staged)
    used = blocks[blocks >= 0].long()
    assert staged.float()[blocks >= 0].equal(part.float()[used])
    assert staged.float()[2].eq(0).all()
    other = torch.full(shape, 7.0).to(dtype)
    target = other[:, layers, :, heads]
    scatter_blocks(target, blocks.flip(0), staged.flip(0).contiguous())
    assert target.float()[used].equal(part.float()[used])
    target[used] = 7.0
    assert other.float().eq(7).all(), "written outside the part"


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_layers_of_blocks_are_gathered_as_by_torch(dtype):
    layout = KVLayout(layers=5, kv_heads=3, block_size=8, head_dim=64, dtype=dtype)
    pool = torch.randint(0, 256, (7 * layout.block_bytes,), dtype=torch.uint8)
    blocks, layers = torch.tensor([6, 0, 3]), LayerRange(1, 4)
    assert gather_by_kernel(pool, layout, blocks, layers).equal(
        gather_kv(pool, layout, blocks, layers)
    )
