from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from baton.core.kv_layout import KVLayout
from baton.kernels.kv_convert import convert_kv, scale_view, value_view

MODEL = KVLayout(layers=3, kv_heads=2, block_size=16, head_dim=4, dtype="float32")
DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn")
TOKENS = 45
# A float8 has 3 bits of fraction and 6 more in its exponent than it needs for half of amax.
TOLERANCE = {"float32": 0.0, "bfloat16": 2.0**-8, "float16": 2.0**-11, "float8_e4m3fn": 2.0**-4}


def garbage(layout: KVLayout, blocks: int) -> Tensor:
    return torch.full((blocks * layout.block_bytes,), 0x3B, dtype=torch.uint8)


def decoded(memory: Tensor, layout: KVLayout) -> Tensor:
    values = value_view(memory, layout).to(torch.float32)
    if layout.scaled:
        values = values * scale_view(memory, layout)[..., None, None]
    return values


def encoded(values: Tensor, layout: KVLayout) -> Tensor:
    """Return float32 values [units, ...] as staging memory; scales differ by head."""
    memory = garbage(layout, values.shape[0])
    if layout.scaled:
        scales = torch.rand(values.shape[:4]) + 0.5
        scale_view(memory, layout).copy_(scales)
        values = values / scales[..., None, None]
    view = value_view(memory, layout)
    view.copy_(values.to(view.dtype))
    return memory


@pytest.mark.parametrize(("source", "target"), list(product(DTYPES, repeat=2)))
@pytest.mark.parametrize(("unit", "block"), [(8, 8), (8, 16), (16, 16), (8, 32)])
def test_values_are_those_of_the_source(source: str, target: str, unit: int, block: int) -> None:
    torch.manual_seed(0)
    staging = replace(MODEL, layers=2, block_size=unit, dtype=source)
    layout = replace(MODEL, block_size=block, dtype=target)
    units, per_block = -(-TOKENS // unit), block // unit
    staged = encoded(torch.randn(units, 2, 2, 2, unit, 4), staging)
    wanted = decoded(staged, staging).movedim(4, 1).flatten(0, 1)[:TOKENS]
    blocks = [5, 0, 6, 2, 3, 1][: -(-units // per_block)]
    pool = garbage(layout, 8)
    before = pool.clone()
    convert_kv(staged, staging, pool, layout, blocks, tokens=TOKENS, first_layer=1, first_slot=0)

    found = decoded(pool, layout)[blocks][:, 1:]  # [blocks, 2, parts, heads, block, dims]
    by_token = found.movedim(4, 1).flatten(0, 1)[:TOKENS]
    largest = wanted.abs().max()
    error = (by_token - wanted).abs()
    allowed = wanted.abs() * TOLERANCE[target] + largest * TOLERANCE[target] * 2.0**-8
    assert torch.all(error <= allowed)

    spared = [b for b in range(8) if b not in blocks]
    shape = (8, layout.layers, -1)
    assert torch.equal(pool.view(shape)[spared], before.view(shape)[spared])
    assert torch.equal(pool.view(shape)[:, 0], before.view(shape)[:, 0])


def test_units_may_begin_and_end_inside_a_block() -> None:
    staging = replace(MODEL, block_size=8, dtype="bfloat16")
    values = torch.randn(2, 3, 2, 2, 8, 4).to(torch.bfloat16).to(torch.float32)
    layout = replace(MODEL, block_size=32)
    pool = garbage(layout, 2)
    before = value_view(pool, layout).clone()
    staged = encoded(values, staging)
    convert_kv(staged, staging, pool, layout, [1], tokens=13, first_layer=0, first_slot=8)
    after = value_view(pool, layout)
    assert torch.equal(after[1, ..., 8:16, :], values[0])
    assert torch.equal(after[1, ..., 16:21, :], values[1][..., :5, :])
    assert torch.equal(after[1, ..., :8, :], before[1, ..., :8, :])
    assert torch.equal(after[1, ..., 21:, :], before[1, ..., 21:, :])
    assert torch.equal(after[0], before[0])


def test_a_head_of_zeros_has_a_scale_that_can_be_divided_by() -> None:
    staging, layout = MODEL, replace(MODEL, dtype="float8_e4m3fn")
    pool = garbage(layout, 1)
    staged = torch.zeros(staging.block_bytes, dtype=torch.uint8)
    convert_kv(staged, staging, pool, layout, [0], tokens=16, first_layer=0, first_slot=0)
    assert torch.all(scale_view(pool, layout) == 1)
    assert torch.all(decoded(pool, layout) == 0)


def test_large_values_fill_the_range_of_float8_and_do_not_overflow() -> None:
    staging, layout = MODEL, replace(MODEL, dtype="float8_e4m3fn")
    values = torch.randn(1, 3, 2, 2, 16, 4) * 1e6
    pool = garbage(layout, 1)
    convert_kv(
        encoded(values, staging), staging, pool, layout, [0], tokens=16, first_layer=0, first_slot=0
    )
    assert torch.all(value_view(pool, layout).to(torch.float32).abs().amax(dim=(4, 5)) == 448)
    assert torch.all(decoded(pool, layout).isfinite())


def test_scales_need_whole_blocks() -> None:
    layout = replace(MODEL, dtype="float8_e4m3fn")
    pool, staged = garbage(layout, 2), garbage(MODEL, 2)
    with pytest.raises(AssertionError, match="whole block"):
        convert_kv(staged, MODEL, pool, layout, [0, 1], tokens=32, first_layer=0, first_slot=8)
    with pytest.raises(AssertionError, match="32 tokens for 1 blocks"):
        convert_kv(staged, MODEL, pool, layout, [0], tokens=32, first_layer=0, first_slot=0)
    with pytest.raises(AssertionError, match="float32 has no scales"):
        scale_view(staged, MODEL)


def test_what_old_tokens_left_behind_the_last_does_not_widen_the_scale() -> None:
    layout = replace(MODEL, dtype="float8_e4m3fn")
    values = torch.ones(1, 3, 2, 2, 16, 4)
    values[..., 10:, :] = 1e9
    pool = garbage(layout, 1)
    staged = encoded(values, MODEL)
    convert_kv(staged, MODEL, pool, layout, [0], tokens=10, first_layer=0, first_slot=0)
    assert torch.all(decoded(pool, layout)[..., :10, :] == 1)
    assert torch.all(decoded(pool, layout)[..., 10:, :] == 0)
