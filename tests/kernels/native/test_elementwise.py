"""The native operations between linear layers and attention, against torch's."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from baton.kernels.clamped_swiglu import clamped_swiglu
from baton.kernels.gelu_mul import gelu_mul
from baton.kernels.rms_norm import rms_norm
from baton.kernels.rope import RopeAngles, rope_, rope_angles
from baton.kernels.silu_mul import silu_mul


def units_off(found: Tensor, exact: Tensor) -> float:
    """Return the largest error in units of the last place of what is exact (float64)."""
    size = exact.float().abs()
    unit = torch.nextafter(size, torch.tensor(float("inf"))).double() - size.double()
    return ((found.double() - exact).abs() / unit).max().item()


def test_exp_and_tanh(operations: Any) -> None:
    near = torch.linspace(-20, 20, 100_001)
    x = torch.cat([near, near / 100, torch.linspace(-87, 88, 10_000), torch.tensor([0.0])])
    exps, tanhs, _ = operations.exp_and_tanh(x)
    assert units_off(exps, x.double().exp()) <= 1.5
    assert units_off(tanhs, x.double().tanh()) <= 2
    assert (exps[-1], tanhs[-1]) == (1, 0)
    ends = torch.tensor([float("-inf"), -1e30, -88.0, 89.0, float("inf")])
    exps, tanhs, _ = operations.exp_and_tanh(ends)
    assert exps[:3].tolist() == [0, 0, 0]
    assert tanhs.tolist() == [-1, -1, -1, 1, 1]


def test_exp_below(operations: Any) -> None:
    """Of shares: exact at 0 and where nothing is left, and good to 4e-7 where they count."""
    x = torch.cat([torch.linspace(-2, 0, 100_001), torch.linspace(-87, -2, 10_000)])
    _, _, found = operations.exp_and_tanh(x)
    off = (found.double() / x.double().exp() - 1).abs()
    assert off[:100_001].max() <= 4e-7
    assert off.max() <= 8e-6  # the rounding of log2(e), times x
    ends = torch.tensor([0.0, -0.0, -88.0, -1e30, float("-inf")])
    assert operations.exp_and_tanh(ends)[2].tolist() == [1, 1, 0, 0, 0]


@pytest.mark.parametrize("width", [1, 8, 19, 64, 257, 2048])
@pytest.mark.parametrize("threads", [1, 3])
def test_rms_norm(operations: Any, width: int, threads: int) -> None:
    x, weight, out = torch.randn(5, width + 3), torch.randn(width), torch.empty(5, width)
    operations(
        "rms_norm",
        threads,
        x=x,
        x_stride=width + 3,
        weight=weight,
        eps=1e-5,
        out=out,
        out_stride=width,
        rows=5,
        width=width,
    )
    torch.testing.assert_close(out, rms_norm(x[:, :width], weight, 1e-5))


@pytest.mark.parametrize("width", [3, 8, 100, 1000])
@pytest.mark.parametrize("threads", [1, 3])
def test_gates(operations: Any, width: int, threads: int) -> None:
    """In the order of the enum Gate, also far from 0."""
    gate_up = torch.randn(5, 2 * width) * 4
    gate_up[0, 0], gate_up[1, 0], gate_up[0, width] = 200, -200, 50
    expected = [silu_mul(gate_up), gelu_mul(gate_up), clamped_swiglu(gate_up, 1.7, 7.0)]
    for gate, wanted in enumerate(expected):
        out = torch.empty(5, width)
        operations(
            "gate_mul",
            threads,
            gate_up=gate_up,
            gate_up_stride=2 * width,
            out=out,
            out_stride=width,
            rows=5,
            width=width,
            gate=gate,
            alpha=1.7,
            limit=7.0,
        )
        torch.testing.assert_close(out, wanted, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("count", [1, 16, 1001])
@pytest.mark.parametrize("threads", [1, 3])
def test_add_and_softcap(operations: Any, count: int, threads: int) -> None:
    x, y = torch.randn(count) * 40, torch.randn(count)
    expected = torch.tanh((x + y) / 30) * 30
    operations("add", threads, x=x, y=y, count=count)
    operations("softcap", threads, x=x, cap=30.0, count=count)
    torch.testing.assert_close(x, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gather(operations: Any, dtype: torch.dtype) -> None:
    table, index = torch.randn(50, 37).to(dtype), torch.tensor([3, 49, 0, 3], dtype=torch.int32)
    out = torch.empty(4, 37)
    operations(
        "gather_floats" if dtype == torch.float32 else "gather_bf16",
        2,
        table=table,
        table_stride=37,
        index=index,
        scale=3.5,
        out=out,
        out_stride=37,
        rows=4,
        width=37,
    )
    assert torch.equal(out, table[index].float() * 3.5)


# ---- Heads on their way to attention: places, angles, norm, rotation and the write to the pool

POSITIONS = torch.tensor([14, 15, 16, 17, 18, 8])
"""Five new tokens of one sequence and one of another."""
BLOCKS = torch.tensor([0, 0, 8, 8, 8, 2])
HEADS, KV_HEADS, BLOCK_SIZE, LAYERS = 4, 2, 8, 3


def places(operations: Any, pool: Tensor, threads: int) -> tuple[Tensor, Tensor]:
    """Return the tokens' slots (int64) and positions (int32)."""
    tables = [torch.tensor(table, dtype=torch.int32) for table in ([4, 0, 8], [5, 2])]
    slots, positions = torch.empty(6, dtype=torch.int64), torch.empty(6, dtype=torch.int32)
    operations(
        "place_tokens",
        threads,
        sequences=operations.sequences([(5, 19), (1, 9)], tables),
        count=2,
        shape=operations.shape(pool),
        slots=slots,
        positions=positions,
    )
    return slots, positions


def angles_of(
    operations: Any, positions: Tensor, pairs: int, threads: int
) -> tuple[Tensor, Tensor, RopeAngles]:
    """Return cos and sin [tokens, pairs], and the same as torch has it."""
    frequencies = 10_000.0 ** -(torch.arange(pairs) / pairs)
    cos, sin = torch.empty(2, 6, pairs)
    operations(
        "rope_table",
        threads,
        positions=positions,
        frequencies=frequencies,
        magnitude=1.25,
        cos=cos,
        sin=sin,
        tokens=6,
        pairs=pairs,
    )
    return cos, sin, rope_angles(POSITIONS, frequencies, torch.float32, 1.25)


@pytest.mark.parametrize(("head_dim", "turned"), [(8, 8), (32, 32), (64, 16), (80, 20), (96, 96)])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_before_attention(
    operations: Any, head_dim: int, turned: int, normed: bool, threads: int, dtype: torch.dtype
) -> None:
    pool = torch.zeros(9, LAYERS, 2, KV_HEADS, BLOCK_SIZE, head_dim, dtype=dtype)
    slots, positions = places(operations, pool, threads)
    assert torch.equal(positions.long(), POSITIONS)
    cos, sin, angles = angles_of(operations, positions, turned // 2, threads)
    torch.testing.assert_close(cos, angles.cos[:, 0, 0])
    torch.testing.assert_close(sin, angles.sin[:, 0, 1])

    qkv = torch.randn(6, HEADS + 2 * KV_HEADS, head_dim)
    weights = torch.randn(HEADS + KV_HEADS, head_dim)
    expected = qkv.clone()
    q_and_k = expected[:, : HEADS + KV_HEADS]
    if normed:
        q_and_k.copy_(functional.rms_norm(q_and_k, (head_dim,), eps=1e-6) * weights)
    rope_(q_and_k[..., :turned], angles)
    operations(
        "prepare_heads",
        threads,
        heads=qkv,
        stride=qkv.stride(0),
        tokens=6,
        q_heads=HEADS,
        norm_weights=weights if normed else None,
        eps=1e-6,
        cos=cos,
        sin=sin,
        pairs=turned // 2,
        pool=pool[0, 1],
        narrow=dtype == torch.bfloat16,
        shape=operations.shape(pool),
        slots=slots,
    )
    torch.testing.assert_close(qkv[:, :HEADS], expected[:, :HEADS])
    kv = pool[BLOCKS, 1, :, :, POSITIONS % BLOCK_SIZE]
    assert torch.equal(kv.flatten(1, 2), qkv[:, HEADS:].to(dtype))
    torch.testing.assert_close(qkv, expected)
    pool[BLOCKS, 1, :, :, POSITIONS % BLOCK_SIZE] = 0
    assert not pool.any()


@pytest.mark.parametrize("count", [1, 5, 16, 31, 32, 33, 100])
def test_rounds_as_torch_does(operations: Any, count: int) -> None:
    """To the nearest, of two the even one; and what is too small to be normal to 0."""
    words = torch.randint(-(2**31), 2**31, (1000, count), dtype=torch.int64).to(torch.int32)
    words[::3] = (words[::3] & -0x10000) | 0x8000  # halfway between two
    special = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 3.4e38, 1.0])
    x = torch.cat([words.view(torch.float32).flatten(), special])
    found = torch.cat([operations.narrowed(row) for row in x.split(count)])
    expected = torch.where(x.abs() < 2.0**-126, x * 0, x).to(torch.bfloat16)
    assert torch.equal(found.isnan(), x.isnan())
    known = ~x.isnan()
    assert torch.equal(found[known].view(torch.int16), expected[known].view(torch.int16))
