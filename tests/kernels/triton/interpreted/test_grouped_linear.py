import pytest
import torch

from baton.kernels.triton.grouped_linear import grouped_linear, tile_rows
from baton.kernels.triton.moe_routing import order_by_expert
from baton.kernels.triton.weight_formats import pack_mxfp4, quantise_float8, quantise_int8
from baton.models.blocks.mxfp4 import dequantise
from tests.kernels.triton.attention_cases import error

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3}


def plain(weight):
    return weight.double(), weight, None


def eight_bits(quantise):
    def quantised(weight):
        stored, scales = quantise(weight)
        return stored.double() * scales[..., None].double(), stored, scales

    return quantised


def mxfp4(weight):
    """Random bits of the weight's shape, as they are published."""
    random = torch.Generator().manual_seed(7)
    shape = (*weight.shape[:2], weight.shape[2] // 32)
    blocks = torch.randint(0, 256, (*shape, 16), generator=random, dtype=torch.uint8)
    scales = torch.randint(118, 128, shape, generator=random, dtype=torch.uint8)
    return dequantise(blocks, scales).double(), *pack_mxfp4(blocks, scales)


def check(tokens, experts, rows, dtype, *, quantise=None, inputs=96, outputs=80):
    random = torch.Generator().manual_seed(0)
    top_k = 2
    chosen = torch.randint(0, experts, (tokens, top_k), generator=random, dtype=torch.int32)
    chosen[0, 1] = -1  # another rank's
    x = torch.randn((tokens, inputs), generator=random).to(dtype)
    weight = torch.randn((experts, outputs, inputs), generator=random).to(dtype)
    bias = torch.randn((experts, outputs), generator=random).to(dtype)
    weights = torch.rand((tokens, top_k), generator=random)
    kept, stored, scales = (quantise or plain)(weight)
    order = order_by_expert(chosen, experts, rows)
    found = grouped_linear(x, stored, order, scales=scales, bias=bias)
    own = chosen.flatten() >= 0
    matrices = kept[chosen.flatten().clamp(min=0).long()]
    biases = bias.double()[chosen.flatten().clamp(min=0).long()]
    expected = torch.einsum("si,soi->so", x.double().repeat_interleave(top_k, 0), matrices)
    expected = (expected + biases) * own[:, None]
    assert error(found, expected) < TOLERANCE[dtype]
    slots = torch.randn((tokens * top_k, inputs), generator=random).to(dtype)
    found = grouped_linear(slots, stored, order, scales=scales, weights=weights)
    expected = torch.einsum("si,soi->so", slots.double(), matrices)
    expected *= (weights.flatten().double() * own)[:, None]
    assert error(found, expected) < TOLERANCE[dtype]
    assert found[~own].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "experts", "rows"), [(3, 4, 16), (40, 3, 16), (70, 3, 64)])
def test_each_slot_goes_through_its_expert(tokens, experts, rows, dtype):
    check(tokens, experts, rows, dtype)


@pytest.mark.parametrize("quantise", [quantise_float8, quantise_int8])
def test_weights_of_eight_bits(quantise):
    check(10, 3, 16, torch.bfloat16, quantise=eight_bits(quantise), inputs=256)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "rows", "inputs"), [(10, 16, 64), (40, 64, 96), (10, 16, 160)])
def test_weights_of_mxfp4(tokens, rows, inputs, dtype):
    check(tokens, 3, rows, dtype, quantise=mxfp4, inputs=inputs)


def test_tiles_grow_with_the_visits():
    assert [tile_rows(slots, 8) for slots in (2, 128, 512, 8192)] == [16, 16, 64, 128]
