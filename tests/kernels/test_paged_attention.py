"""The reference of paged attention and of the writes before it, on pools with scales too."""

import pytest
import torch

from baton.core.kv_layout import KVLayout
from baton.kernels.attention_scores import Scoring
from baton.kernels.kv_convert import scale_view, value_view
from baton.kernels.kv_pool import PagedLayer, paged_layers
from baton.kernels.paged_attention import PagedAttention
from baton.kernels.paged_batch import PagedBatch
from baton.kernels.rope import rope_tables
from baton.kernels.rope_kv_write import rope_kv_write_

HEADS, KV_HEADS, DIM, BLOCK = 4, 2, 16, 8
BLOCKS = 6


def layer_of(dtype: torch.dtype) -> PagedLayer:
    """One layer of a pool whose free slots hold NaN; scales, if any, differ by block and head."""
    if dtype == torch.float32:
        return paged_layers(torch.full((BLOCKS, 3, 2, KV_HEADS, BLOCK, DIM), float("nan")))[1]
    layout = KVLayout(3, KV_HEADS, BLOCK, DIM, "float8_e4m3fn")
    memory = torch.full((BLOCKS * layout.block_bytes,), 0x7F, dtype=torch.uint8)  # NaN
    values, scales = value_view(memory, layout), scale_view(memory, layout)
    scales.uniform_(0.01, 1, generator=torch.Generator().manual_seed(1))
    return paged_layers(values, scales)[1]


def computed(layer: PagedLayer, window: int | None) -> torch.Tensor:
    """A prompt of 11 in chunks of 6 and 5, then two tokens one by one; beside padding."""
    random = torch.Generator().manual_seed(2)
    qkv = torch.randn((13, HEADS + 2 * KV_HEADS, DIM), generator=random)
    table = torch.tensor([[4, 0], [2, 2]], dtype=torch.int32)
    angles = rope_tables(torch.arange(13), torch.rand(DIM // 4, generator=random))
    found = []
    for start, end in ((0, 6), (6, 11), (11, 12), (12, 13)):
        rows = qkv[start:end].clone()
        slots = torch.tensor([table[0, i // BLOCK] * BLOCK + i % BLOCK for i in range(start, end)])
        rope_kv_write_(rows, layer, slots, type(angles)(*(x[start:end] for x in angles)))
        chunk = end - start > 1
        batch = PagedBatch(
            table,
            torch.tensor([end, 0], dtype=torch.int32),
            0 if chunk else 2,
            torch.tensor([0, end - start, end - start]).int() if chunk else None,
        )
        q = rows[:, :HEADS]
        if not chunk:
            q = torch.cat([q, torch.full_like(q, float("nan"))])
        out = PagedAttention(batch).attend(q, layer, Scoring(0.25), window)
        assert out[end - start :].eq(0).all(), "padding"
        found.append(out[: end - start])
    return torch.cat(found)


@pytest.mark.parametrize("window", [None, 5])
def test_chunks_and_decodes_are_one_prompt(window: int | None) -> None:
    found = computed(layer_of(torch.float32), window)
    whole = layer_of(torch.float32)
    random = torch.Generator().manual_seed(2)
    qkv = torch.randn((13, HEADS + 2 * KV_HEADS, DIM), generator=random)
    angles = rope_tables(torch.arange(13), torch.rand(DIM // 4, generator=random))
    slots = torch.cat([torch.arange(32, 40), torch.arange(5)])
    rope_kv_write_(qkv, whole, slots, angles)
    batch = PagedBatch(
        torch.tensor([[4, 0]]).int(), torch.tensor([13]).int(), 0, torch.tensor([0, 13]).int()
    )
    expected = PagedAttention(batch).attend(qkv[:, :HEADS], whole, Scoring(0.25), window)
    assert (found - expected).abs().max() < 1e-5


def test_scaled_values_stand_for_what_was_written() -> None:
    scaled, plain = layer_of(torch.float8_e4m3fn), layer_of(torch.float32)
    found, expected = computed(scaled, None), computed(plain, None)
    assert (found - expected).norm() / expected.norm() < 0.05
    assert scaled.scales is not None
    kept = scaled.values[4].float() * scaled.scales[4][..., None, None]
    assert (kept - plain.values[4]).norm() / plain.values[4].norm() < 0.04
