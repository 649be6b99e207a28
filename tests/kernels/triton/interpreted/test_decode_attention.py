import pytest
import torch

from baton.kernels.attention_scores import Scoring
from baton.kernels.triton import decode_plan
from baton.kernels.triton.decode_attention import decode_attention, decode_programs
from baton.kernels.triton.decode_plan import plan_decode
from tests.kernels.triton.attention_cases import Paged, attention, error, paged

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3}


def check(
    case: Paged,
    heads: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    scoring: Scoring | None = None,
    window: int | None = None,
    scales: torch.Tensor | None = None,
) -> None:
    head_dim, kv_heads = case.kv.shape[4], case.kv.shape[2]
    random = torch.Generator().manual_seed(1)
    rows = len(case.lengths)
    qkv = torch.randn((rows, heads + 3, head_dim), generator=random).to(dtype)
    q = qkv[:, :heads]  # as it lies beside K and V
    scoring = scoring or Scoring(head_dim**-0.5)
    plan = plan_decode(case.lengths, decode_programs(heads, kv_heads), window)
    found = decode_attention(q, case.kv, case.tables, plan, scoring, scales)
    for row in range(rows):
        if case.lengths[row] == 0:
            assert found[row].eq(0).all()
            continue
        expected = attention(q[row : row + 1], case.tokens(row, scales), scoring, window=window)
        assert error(found[row], expected[0]) < TOLERANCE[dtype], f"row {row}"


def split_often(monkeypatch: pytest.MonkeyPatch, programs: int = 12) -> None:
    monkeypatch.setattr(decode_plan, "_PROGRAMS", programs)
    monkeypatch.setattr(decode_plan, "_LEAST_TILES", 1)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2), (3, 1), (5, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_share_kv(heads, kv_heads, dtype, monkeypatch):
    split_often(monkeypatch)
    check(paged([70, 1, 130], kv_heads, 64, dtype=dtype), heads, dtype=dtype)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
def test_head_dims(head_dim, monkeypatch):
    split_often(monkeypatch, 4)
    check(paged([100, 17], 1, head_dim), 2)


def test_more_heads_than_a_program_takes(monkeypatch):
    split_often(monkeypatch, 4)
    check(paged([33], 1, 64), 72)


@pytest.mark.parametrize("block_size", [8, 32, 64, 128])
def test_block_sizes(block_size, monkeypatch):
    split_often(monkeypatch, 4)
    check(paged([150, 64], 1, 64, block_size=block_size), 2)


@pytest.mark.parametrize("window", [1, 40, 64, 100, 1000])
@pytest.mark.parametrize("head_dim", [64, 256])
def test_a_window_hides_what_is_far(window, head_dim, monkeypatch):
    split_often(monkeypatch, 6)
    check(paged([190, 70, 5], 1, head_dim), 2, window=window)


@pytest.mark.parametrize("programs", [1, 12])
def test_softcap_and_sinks(programs, monkeypatch):
    split_often(monkeypatch, programs)
    sinks = torch.tensor([2.0, -1.0, 0.0, 7.0]).bfloat16()
    case = paged([190, 3], 2, 64)
    check(case, 4, scoring=Scoring(0.3, softcap=1.5))
    check(case, 4, scoring=Scoring(0.3, sinks=sinks))
    check(case, 4, scoring=Scoring(0.3, softcap=5.0, sinks=sinks), window=100)


def test_fp8_kv_with_scales(monkeypatch):
    split_often(monkeypatch)
    case = paged([70, 130], 2, 64, dtype=torch.float8_e4m3fn)
    check(case, 4)
    scales = torch.rand((len(case.kv), 2, 2), generator=torch.Generator().manual_seed(3)) + 0.25
    check(case, 4, scales=scales)
    of_all = torch.tensor([[0.5, 3.0], [2.0, 0.25]])
    check(case, 4, scales=of_all.expand(len(case.kv), 2, 2))


def test_padding_rows_give_zero(monkeypatch):
    split_often(monkeypatch)
    check(paged([0, 65, 0, 1], 1, 64), 2)


@pytest.mark.parametrize("window", [None, 100])
def test_items_cover_every_token_once(window):
    random = torch.Generator().manual_seed(2)
    for rows, programs in ((1, 8), (3, 1), (20, 8), (40, 64)):
        lengths = torch.randint(0, 5000, (rows,), generator=random, dtype=torch.int32)
        plan = plan_decode(lengths, programs, window)
        first = plan.firsts.tolist()
        span = plan.span.item()
        rows_of = plan.items[:, 0].tolist()
        assert rows_of[: first[-1]] == [
            r for r in range(rows) for _ in range(first[r], first[r + 1])
        ]
        assert set(rows_of[first[-1] :]) <= {-1}
        for row, length in enumerate(lengths.tolist()):
            low = max(0, length - window) // 64 * 64 if window else 0
            count = first[row + 1] - first[row]
            assert plan.items[first[row] : first[row + 1], 1].tolist() == list(range(count))
            assert low + count * span >= length
            assert count == 1 or low + (count - 1) * span < length
