import pytest
import torch

from baton.kernels.attention_scores import Scoring
from baton.kernels.triton import prefill_attention as kernel
from baton.kernels.triton.prefill_attention import prefill_attention
from tests.kernels.triton.attention_cases import attention, error, paged

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of 16 rows and 32 keys, so that short chunks have several."""
    tile = kernel.Tile(32, 4, 2)
    monkeypatch.setattr(kernel, "_TILES", {64: (16, tile), 128: (16, tile)})
    monkeypatch.setattr(kernel, "_WIDE", (16, tile))


def check(
    chunks: list[int],
    lengths: list[int],
    heads: int = 2,
    kv_heads: int = 1,
    head_dim: int = 64,
    *,
    dtype: torch.dtype = torch.bfloat16,
    kv_dtype: torch.dtype | None = None,
    scoring: Scoring | None = None,
    window: int | None = None,
    scales: torch.Tensor | None = None,
    padding: int = 0,
    block_size: int = 16,
    skip_below: float = 0.0,
    tolerance: float | None = None,
) -> None:
    case = paged(lengths, kv_heads, head_dim, dtype=kv_dtype or dtype, block_size=block_size)
    random = torch.Generator().manual_seed(1)
    tokens = sum(chunks) + padding
    qkv = torch.randn((tokens, heads + 3, head_dim), generator=random).to(dtype)
    q = qkv[:, :heads]
    starts = torch.tensor([0, *torch.tensor(chunks).cumsum(0).tolist()], dtype=torch.int32)
    scoring = scoring or Scoring(head_dim**-0.5)
    found = prefill_attention(
        q, case.kv, case.tables, starts, case.lengths, scoring, window=window, kv_scales=scales,
        skip_below=skip_below,
    )  # fmt: skip
    for i in range(len(chunks)):
        rows = slice(int(starts[i]), int(starts[i + 1]))
        if rows.start == rows.stop:
            continue
        expected = attention(q[rows], case.tokens(i, scales), scoring, window=window)
        assert error(found[rows], expected) < (tolerance or TOLERANCE[dtype]), f"sequence {i}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (3, 1)])
def test_whole_prompts(heads, kv_heads, dtype):
    check([33, 1, 16], [33, 1, 16], heads, kv_heads, dtype=dtype)


def test_chunks_after_a_prefix():
    check([5, 17, 1, 40], [70, 17, 64, 81])


@pytest.mark.parametrize("head_dim", [80, 128, 192, 256])
def test_head_dims(head_dim):
    check([20], [41], head_dim=head_dim)


@pytest.mark.parametrize("block_size", [8, 64])
def test_block_sizes(block_size):
    check([20], [75], block_size=block_size)


@pytest.mark.parametrize("window", [1, 7, 32, 50, 200])
def test_a_window_hides_what_is_far(window):
    check([40, 3], [110, 90], window=window)


def test_softcap_and_sinks():
    sinks = torch.tensor([2.0, -1.0]).bfloat16()
    check([20], [50], scoring=Scoring(0.3, softcap=1.5))
    check([20], [50], scoring=Scoring(0.3, sinks=sinks))
    check([20], [50], scoring=Scoring(0.3, softcap=5.0, sinks=sinks), window=9)


def test_fp8_kv_with_scales():
    scales = torch.rand((7, 2, 2), generator=torch.Generator().manual_seed(3)) + 0.25
    check([20], [50], 4, 2, kv_dtype=torch.float8_e4m3fn)
    check([20], [50], 4, 2, kv_dtype=torch.float8_e4m3fn, scales=scales)


def test_rows_that_are_padding_and_sequences_without_rows():
    check([17, 0, 3], [30, 12, 8], padding=30)


@pytest.mark.parametrize("window", [None, 60])
def test_what_is_left_out_is_bounded(window):
    """Below a threshold of 0 nothing is; the bound is 2 × keys × threshold × largest value."""
    sharp = Scoring(3.0)
    check([20], [150], scoring=sharp, window=window, skip_below=1e-9)
    check([20], [150], scoring=sharp, window=window, skip_below=1e-3, tolerance=0.05)


def test_negligible_tiles_are_left_out():
    """Keys that nothing is given to may hold NaN values: they are not read."""
    kv = torch.zeros(8, 2, 1, 16, 64)
    kv[:2, 0, 0, :, 0] = 100.0  # the first 32 keys take all
    kv[:2, 1] = 1.0
    kv[2:, 1] = float("nan")
    q = torch.zeros(16, 1, 64)
    q[:, 0, 0] = 1.0
    tables = torch.arange(8, dtype=torch.int32)[None]
    starts, lengths = torch.tensor([0, 16]).int(), torch.tensor([128]).int()
    found = [
        prefill_attention(q, kv, tables, starts, lengths, Scoring(1.0), skip_below=below)
        for below in (0.0, 1e-6)
    ]
    assert found[0].isnan().all()
    assert found[1].eq(1).all()
