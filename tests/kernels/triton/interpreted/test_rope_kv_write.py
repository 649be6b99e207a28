import pytest
import torch

from baton.kernels.rope import rope_, rope_angles
from baton.kernels.triton.rope_kv_write import rope_kv_write_
from tests.kernels.triton.attention_cases import error

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float8_e4m3fn: 0.04}
EPS = 1e-6


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(
    ("head_dim", "turned", "heads", "kv_heads"),
    [(64, 64, 4, 2), (96, 96, 3, 1), (80, 32, 2, 2), (128, 64, 40, 1)],
)
@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float8_e4m3fn),
    ],
)
def test_it_is_norm_then_rope_then_write(head_dim, turned, heads, kv_heads, dtype, stored, normed):
    random = torch.Generator().manual_seed(0)
    tokens, block_size = 3, 16
    qkv = torch.randn((tokens, heads + 2 * kv_heads, head_dim), generator=random).to(dtype)
    expected = qkv.double()
    weights = torch.rand((heads + kv_heads, head_dim), generator=random).to(dtype)
    angled = expected[:, : heads + kv_heads]
    if normed:
        angled *= (angled.square().mean(-1, keepdim=True) + EPS).rsqrt() * weights.double()
    frequencies = torch.rand(turned // 2, generator=random)
    positions = torch.tensor([0, 7, 1000])
    angles = rope_angles(positions, frequencies, torch.float32)
    cos, sin = angles.cos[:, 0, 0], angles.sin[:, 0, 1]
    rope_(angled[..., :turned], rope_angles(positions, frequencies, torch.float64))
    pool = torch.full((5, 3, 2, kv_heads, block_size, head_dim), 7.0).to(stored)
    scales = torch.rand((5, 2, kv_heads), generator=random) + 0.5 if stored != dtype else None
    kv = pool[:, 1]
    slots = torch.tensor([3 * block_size + 15, -1, 0])
    rope_kv_write_(
        qkv,
        kv,
        slots,
        cos,
        sin,
        norm_weights=weights if normed else None,
        eps=EPS,
        kv_scales=scales,
    )
    assert error(qkv[:, :heads], expected[:, :heads]) < TOLERANCE[dtype]
    for token, block, offset in ((0, 3, 15), (2, 0, 0)):
        new = expected[token, heads:].view(2, kv_heads, head_dim)
        factor = 1 if scales is None else scales[block].double()[:, :, None]
        assert error(kv[block, :, :, offset].double() * factor, new) < TOLERANCE[stored]
        pool[block, 1, :, :, offset] = 7.0
    assert pool.float().eq(7).all(), "written where no token belongs"
