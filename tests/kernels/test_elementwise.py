"""RMS norm, rotary embedding, SwiGLU gate and linear against plain arithmetic and transformers."""

import math

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from baton.kernels.clamped_swiglu import clamped_swiglu
from baton.kernels.gelu_mul import gelu_mul
from baton.kernels.linear import Linear
from baton.kernels.rms_norm import rms_norm
from baton.kernels.rope import rope_, rope_angles
from baton.kernels.silu_mul import silu_mul


@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_rms_norm(eps: float) -> None:
    x, weight = torch.randn(7, 48) * 3, torch.randn(48)
    expected = (
        x.double() / (x.double().pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight.double()
    )
    torch.testing.assert_close(rms_norm(x, weight, eps), expected.float())


def test_silu_mul() -> None:
    x = torch.randn(5, 12)
    gate, up = x[:, :6].double(), x[:, 6:].double()
    before = x.clone()
    torch.testing.assert_close(silu_mul(x), (gate / (1 + (-gate).exp()) * up).float())
    assert torch.equal(x, before)


def test_gelu_mul() -> None:
    x = torch.randn(5, 12)
    gate, up = x[:, :6].double(), x[:, 6:].double()
    inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    torch.testing.assert_close(gelu_mul(x), (0.5 * gate * (1 + inner.tanh()) * up).float())


def test_clamped_swiglu() -> None:
    x = torch.randn(50, 12) * 3
    gate, up = x[:, :6].double().clamp(max=2.0), x[:, 6:].double().clamp(-2.0, 2.0)
    before = x.clone()
    expected = gate / (1 + (-1.5 * gate).exp()) * (up + 1)
    torch.testing.assert_close(clamped_swiglu(x, 1.5, 2.0), expected.float())
    assert torch.equal(x, before)


def test_rope_rotates_in_place_as_transformers_and_touches_nothing_else() -> None:
    tokens, heads, head_dim = 9, 5, 16
    frequencies = torch.tensor([10000 ** (-2 * i / head_dim) for i in range(head_dim // 2)])
    positions = torch.randint(0, 5000, (tokens,))
    wide = torch.randn(tokens, heads + 2, head_dim)
    before = wide.clone()
    rope_(wide[:, :heads], rope_angles(positions, frequencies, torch.float32))
    angles = torch.cat([positions[:, None] * frequencies] * 2, dim=-1)[None]
    query = before[:, :heads].transpose(0, 1)[None]
    expected, _ = apply_rotary_pos_emb(query, query, angles.cos(), angles.sin())
    torch.testing.assert_close(wide[:, :heads], expected[0].transpose(0, 1))
    assert torch.equal(wide[:, heads:], before[:, heads:])


def test_rope_grows_by_its_magnitude() -> None:
    pair, grown = torch.randn(1, 2, 2), torch.tensor([0.5])
    twice = pair.clone()
    rope_(pair, rope_angles(torch.tensor([3]), grown, torch.float32))
    rope_(twice, rope_angles(torch.tensor([3]), grown, torch.float32, 2.0))
    torch.testing.assert_close(twice, 2 * pair)


def test_rope_turns_by_position_times_frequency() -> None:
    pair = torch.tensor([[[1.0, 0.0]]])
    rope_(pair, rope_angles(torch.tensor([3]), torch.tensor([0.5]), torch.float32))
    torch.testing.assert_close(pair.flatten(), torch.tensor([math.cos(1.5), math.sin(1.5)]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 32, 100])
def test_linear(dtype: torch.dtype, biased: bool, rows: int) -> None:
    weight, x = torch.randn(40, 24).to(dtype), torch.randn(rows, 24).to(dtype)
    bias = torch.randn(40).to(dtype) if biased else None
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    found = Linear(weight, bias)(x)
    assert found.dtype == dtype
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 0.02, "atol": 0.05}
    torch.testing.assert_close(found.double(), expected, **close)


def test_linear_keeps_its_own_weights() -> None:
    weight = torch.randn(8, 8)
    linear, x = Linear(weight.clone()), torch.randn(2, 8)
    before = linear(x).clone()
    torch.testing.assert_close(before, x @ weight.T)
    assert repr(linear).startswith("<Linear 8 -> 8")
