import pytest
import torch

from baton.kernels.attention_scores import Scoring
from baton.kernels.triton import decode_plan
from baton.kernels.triton.decode_plan import plan_decode
from baton.kernels.triton.mla_decode import mla_decode, mla_programs
from tests.kernels.triton.attention_cases import attention, error, paged

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3}


@pytest.mark.parametrize(
    ("heads", "rank", "turned", "dtype", "stored", "window"),
    [
        (3, 64, 16, torch.float32, torch.float32, None),
        (20, 64, 8, torch.bfloat16, torch.bfloat16, None),
        (70, 32, 16, torch.bfloat16, torch.bfloat16, 70),
        (16, 512, 64, torch.bfloat16, torch.bfloat16, None),
        (4, 64, 16, torch.bfloat16, torch.float8_e4m3fn, None),
    ],
)
@pytest.mark.parametrize("programs", [1, 8])
def test_heads_share_one_vector(heads, rank, turned, dtype, stored, window, programs, monkeypatch):
    monkeypatch.setattr(decode_plan, "_PROGRAMS", programs)
    monkeypatch.setattr(decode_plan, "_LEAST_TILES", 1)
    case = paged([100, 0, 1], 1, rank + turned, parts=1, dtype=stored)
    random = torch.Generator().manual_seed(1)
    q = torch.randn((3, heads, rank + turned), generator=random).to(dtype)
    scales = None
    if stored != dtype:
        scales = torch.rand((len(case.kv), 1, 1), generator=random) + 0.5
    scoring = Scoring(0.1)
    plan = plan_decode(case.lengths, mla_programs(heads, stored), window)
    found = mla_decode(q, case.kv, case.tables, plan, scoring, rank=rank, kv_scales=scales)
    assert found[1].eq(0).all()
    for row in (0, 2):
        kv = case.tokens(row, scales)
        expected = attention(q[row : row + 1], kv, scoring, window=window)[0, :, :rank]
        assert error(found[row], expected) < TOLERANCE[dtype]
