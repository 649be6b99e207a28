import pytest
import torch

from baton.kernels.triton.add_rms_norm import add_rms_norm_, add_rms_norm_fp8_
from tests.kernels.triton.attention_cases import error

EPS = 1e-5


@pytest.mark.parametrize("hidden", [64, 576, 1024])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_the_stream_grows_and_is_normed(hidden, dtype, tolerance):
    random = torch.Generator().manual_seed(0)
    x, stream = (torch.randn((3, hidden), generator=random).to(dtype) for _ in range(2))
    weight = torch.rand(hidden, generator=random).to(dtype)
    total = (x.float() + stream.float()).to(dtype)
    expected = total.double() * (total.double().square().mean(-1, keepdim=True) + EPS).rsqrt()
    expected *= weight.double()
    before = stream.clone()
    found = add_rms_norm_(x, stream, weight, EPS)
    assert stream.equal(total)
    assert error(found, expected) < tolerance
    quantised, scales = add_rms_norm_fp8_(x, before, weight, EPS)
    assert before.equal(total)
    assert error(quantised.double() * scales[:, None].double(), expected) < 0.04
    assert quantised.float().abs().amax(-1).eq(448).all()


def test_a_row_of_zeros_stays_zero():
    zeros = torch.zeros(2, 64)
    assert add_rms_norm_(zeros, zeros.clone(), torch.ones(64), EPS).eq(0).all()
    quantised, scales = add_rms_norm_fp8_(zeros, zeros.clone(), torch.ones(64), EPS)
    assert quantised.float().eq(0).all()
    assert scales.isfinite().all()
