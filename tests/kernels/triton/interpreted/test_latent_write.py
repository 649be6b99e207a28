import pytest
import torch

from baton.kernels.rope import rope_, rope_angles, rope_tables
from baton.kernels.triton.latent_write import latent_write_
from tests.kernels.triton.attention_cases import error

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float8_e4m3fn: 0.04}
EPS = 1e-6


@pytest.mark.parametrize(
    ("rank", "turned", "heads", "nope"), [(64, 16, 4, 24), (48, 8, 3, 16), (32, 12, 40, 20)]
)
@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float8_e4m3fn),
    ],
)
def test_it_is_norm_then_rope_then_write(rank, turned, heads, nope, dtype, stored):
    random = torch.Generator().manual_seed(0)
    tokens, block_size = 3, 8
    latent = torch.randn((tokens, rank + turned + 4), generator=random).to(dtype)[:, :-4]
    q = torch.randn((tokens, heads, nope + turned), generator=random).to(dtype)
    weight = torch.rand(rank, generator=random).to(dtype)
    expected, turned_q = latent.double().clone(), q.double()
    plain = expected[:, :rank]
    plain *= (plain.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight.double()
    positions, frequencies = torch.tensor([0, 7, 1000]), torch.rand(turned // 2, generator=random)
    angles = rope_angles(positions, frequencies, torch.float64)
    rope_(expected[:, None, rank:], angles)
    rope_(turned_q[..., nope:], angles)
    pool = torch.full((5, 3, 1, 1, block_size, rank + turned), 7.0).to(stored)
    scales = torch.rand((5, 1, 1), generator=random) + 0.5 if stored != dtype else None
    kv = pool[:, 1]
    slots = torch.tensor([3 * block_size + 7, -1, 0])
    tables = rope_tables(positions, frequencies)
    latent_write_(latent, q, kv, slots, tables.cos, tables.sin, weight, EPS, scales)
    assert error(q, turned_q) < TOLERANCE[dtype]
    for token, block, offset in ((0, 3, 7), (2, 0, 0)):
        factor = 1.0 if scales is None else float(scales[block])
        found = kv[block, 0, 0, offset].double() * factor
        assert error(found, expected[token]) < TOLERANCE[stored]
        pool[block, 1, :, :, offset] = 7.0
    assert pool.float().eq(7).all(), "written where no token belongs"
