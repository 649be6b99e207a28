"""Triton's kernels on a GPU, compiled: every test of the interpreter, and sizes it cannot reach."""

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton has wheels for Linux only")

from baton.kernels.attention_scores import Scoring
from baton.kernels.triton.decode_attention import decode_attention, decode_programs
from baton.kernels.triton.decode_plan import plan_decode
from baton.kernels.triton.grouped_linear import grouped_linear, tile_rows
from baton.kernels.triton.moe_routing import order_by_expert
from baton.kernels.triton.prefill_attention import prefill_attention
from baton.kernels.triton.skinny_linear import skinny_linear
from tests.kernels.triton.attention_cases import attention, error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

ROOT = Path(__file__).resolve().parents[2]
BF16 = torch.bfloat16
ATTENTION, PRODUCT = 6e-3, 4e-3
"""|found - float64| / |float64|, of bfloat16."""
HEADS, KV_HEADS, DIM, PAGE = 32, 8, 128, 16


@pytest.fixture(autouse=True)
def on_the_gpu() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.device("cuda"):
        yield


@pytest.mark.timeout(900)
def test_all_that_is_interpreted_is_right_on_the_gpu() -> None:
    """A process of its own: one that fails there may leave the device unusable."""
    folder = ROOT / "tests" / "kernels" / "triton" / "interpreted"
    # Where only what kernels need is installed, the digest's reference cannot be loaded.
    left_out = [] if find_spec("structlog") else [f"--ignore={folder / 'test_kv_digest.py'}"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *left_out, folder],
        cwd=ROOT,
        env=environment | {"BATON_KERNELS_ON": "cuda", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]


def pool(sequences: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return one layer's KV in shuffled blocks, with NaN in a block that is nobody's."""
    each = -(-tokens // PAGE)
    kv = torch.randn(sequences * each + 1, 2, KV_HEADS, PAGE, DIM, dtype=BF16)
    kv[-1] = float("nan")
    tables = torch.randperm(sequences * each, dtype=torch.int32).view(sequences, each)
    return kv, tables


def keys_and_values(kv: torch.Tensor, table: torch.Tensor, length: int) -> torch.Tensor:
    runs = kv[table.long()].double()
    return runs.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :length]


@pytest.mark.parametrize(("batch", "context"), [(1, 8192), (32, 1024), (128, 4096)])
def test_decode_attention_of_8b(batch: int, context: int) -> None:
    kv, tables = pool(batch, context)
    lengths = torch.randint(1, context + 1, (batch,), dtype=torch.int32)
    q = torch.randn(batch, HEADS + 2 * KV_HEADS, DIM, dtype=BF16)[:, :HEADS]
    scoring = Scoring(DIM**-0.5)
    plan = plan_decode(lengths, decode_programs(HEADS, KV_HEADS))
    out = torch.full((batch, HEADS, DIM), float("nan"), dtype=BF16)
    found = decode_attention(q, kv, tables, plan, scoring, out=out)
    again = decode_attention(q, kv, tables, plan, scoring)
    assert found.equal(again), "an error that moves is a race"
    for row in range(0, batch, max(1, batch // 16)):
        seen = keys_and_values(kv, tables[row], int(lengths[row]))
        expected = attention(q[row : row + 1], seen, scoring)
        assert error(found[row], expected[0]) < ATTENTION, f"row {row}"


@pytest.mark.parametrize(("prefix", "tokens"), [(0, 2048), (1500, 700)])
def test_prefill_attention_of_8b(prefix: int, tokens: int) -> None:
    kv, tables = pool(1, prefix + tokens)
    q = torch.randn(tokens, HEADS, DIM, dtype=BF16)
    starts = torch.tensor([0, tokens], dtype=torch.int32)
    lengths = torch.tensor([prefix + tokens], dtype=torch.int32)
    scoring = Scoring(DIM**-0.5)
    found = prefill_attention(q, kv, tables, starts, lengths, scoring)
    seen = keys_and_values(kv, tables[0], prefix + tokens)
    rows = slice(tokens - 256, tokens)  # of those that see most; all of them would be 1 GB
    assert error(found[rows], attention(q[rows], seen, scoring)) < ATTENTION
    first = attention(q[:64], seen[:, :, : prefix + 64], scoring)
    assert error(found[:64], first) < ATTENTION


@pytest.mark.parametrize("rows", [1, 16, 32, 64])
@pytest.mark.parametrize(("outputs", "inputs"), [(6144, 4096), (28672, 4096), (4096, 14336)])
def test_products_of_few_rows_of_8b(rows: int, outputs: int, inputs: int) -> None:
    x, weight = torch.randn(rows, inputs, dtype=BF16), torch.randn(outputs, inputs, dtype=BF16)
    expected = x.double() @ weight.double().T
    found = skinny_linear(x, weight)
    assert error(found, expected) < PRODUCT
    assert found.equal(skinny_linear(x, weight)), "an error that moves is a race"


@pytest.mark.parametrize("tokens", [1, 64, 1024])
def test_experts_of_mixtral(tokens: int) -> None:
    experts, top_k, inputs, outputs = 8, 2, 4096, 1792
    x = torch.randn(tokens, inputs, dtype=BF16)
    weight = torch.randn(experts, outputs, inputs, dtype=BF16)
    chosen = torch.rand(tokens, experts).topk(top_k).indices.to(torch.int32)
    order = order_by_expert(chosen, experts, tile_rows(chosen.numel(), experts))
    found = grouped_linear(x, weight, order)
    expected = torch.empty(tokens * top_k, outputs, dtype=torch.float64)
    for expert in range(experts):
        slots = (chosen.flatten() == expert).nonzero().flatten()
        expected[slots] = x[slots // top_k].double() @ weight[expert].double().T
    assert error(found, expected) < PRODUCT
