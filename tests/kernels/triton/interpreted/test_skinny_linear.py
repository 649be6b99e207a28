import pytest
import torch

from baton.kernels.triton.skinny_linear import skinny_linear, split_inputs
from baton.kernels.triton.weight_formats import (
    dequantise_int4,
    quantise_float8,
    quantise_int4,
    quantise_int4_from_zeros,
    quantise_int8,
)
from tests.kernels.triton.attention_cases import error

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3}


def operands(rows, outputs, inputs, dtype):
    random = torch.Generator().manual_seed(0)
    x = torch.randn((rows, inputs + 8), generator=random).to(dtype)[:, :inputs]
    weight = torch.randn((outputs, inputs), generator=random)
    return x, weight.to(dtype), torch.randn(outputs, generator=random).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "outputs", "inputs"), [(1, 64, 128), (5, 100, 200), (33, 64, 1100), (64, 70, 1024)]
)
def test_plain_weights(rows, outputs, inputs, dtype):
    x, weight, bias = operands(rows, outputs, inputs, dtype)
    expected = x.double() @ weight.double().T
    assert error(skinny_linear(x, weight), expected) < TOLERANCE[dtype]
    found = skinny_linear(x, weight, bias=bias)
    assert error(found, expected + bias.double()) < TOLERANCE[dtype]


@pytest.mark.parametrize("quantise", [quantise_float8, quantise_int8])
@pytest.mark.parametrize("inputs", [200, 1024])
def test_weights_of_eight_bits(quantise, inputs):
    x, weight, bias = operands(5, 100, inputs, torch.bfloat16)
    stored, scales = quantise(weight)
    kept = stored.double() * scales[:, None].double()
    assert error(kept, weight) < 0.03
    found = skinny_linear(x, stored, scales, bias)
    assert error(found, x.double() @ kept.T + bias.double()) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("inputs", [128, 1024])
def test_weights_of_four_bits(inputs):
    x, weight, bias = operands(5, 100, inputs, torch.bfloat16)
    packed, scales = quantise_int4(weight)
    kept = dequantise_int4(packed, scales).double()
    assert error(kept, weight) < 0.15
    found = skinny_linear(x, packed, scales, bias)
    assert error(found, x.double() @ kept.T + bias.double()) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("inputs", [128, 1024])
def test_weights_of_four_bits_from_zeros(inputs):
    x, weight, bias = operands(5, 100, inputs, torch.bfloat16)
    weight = weight + 1.5  # what is mostly positive has better use for another zero
    packed, scales, zeros = quantise_int4_from_zeros(weight)
    kept = dequantise_int4(packed, scales, zeros).double()
    assert error(kept, weight) < 0.08
    found = skinny_linear(x, packed, scales, bias, zeros)
    assert error(found, x.double() @ kept.T + bias.double()) < TOLERANCE[torch.bfloat16]


def test_splits_keep_the_gpu_busy_and_never_empty():
    assert split_inputs(columns=2000, inputs=4096) == 1
    assert split_inputs(columns=64, inputs=4096) == 8
    assert split_inputs(columns=1, inputs=256) == 1
    for columns in (1, 16, 100, 448):
        for blocks in range(1, 130):
            splits = split_inputs(columns, blocks * 128)
            assert -(-blocks // splits) * (splits - 1) < blocks
