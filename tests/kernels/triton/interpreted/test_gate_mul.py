import pytest
import torch

from baton.kernels.clamped_swiglu import clamped_swiglu
from baton.kernels.gelu_mul import gelu_mul
from baton.kernels.silu_mul import silu_mul
from baton.kernels.triton.gate_mul import gate_mul, gate_mul_fp8
from tests.kernels.triton.attention_cases import error

REFERENCES = {
    "silu": silu_mul,
    "gelu_tanh": gelu_mul,
    "clamped": lambda x: clamped_swiglu(x, 1.702, 1.5),
}


@pytest.mark.parametrize("gate", sorted(REFERENCES))
@pytest.mark.parametrize("columns", [96, 1500])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_gates(gate, columns, dtype, tolerance):
    random = torch.Generator().manual_seed(0)
    gate_up = (2 * torch.randn((3, 2 * columns), generator=random)).to(dtype)
    gate_up[0, :4] = torch.tensor([200.0, -200.0, 90.0, -90.0])
    expected = REFERENCES[gate](gate_up.double())
    assert error(gate_mul(gate_up, gate, alpha=1.702, limit=1.5), expected) < tolerance
    quantised, scales = gate_mul_fp8(gate_up, gate, alpha=1.702, limit=1.5)
    for row in range(3):
        assert error(quantised[row].double() * scales[row].double(), expected[row]) < 0.04
