"""The paged kernels against attention written out, on scattered blocks."""

import math
import random

import pytest
import torch
from torch import Tensor

from baton.core.ids import BlockId, SeqId
from baton.core.kv_layout import KVLayout
from baton.core.request import SamplingParams
from baton.engine.step import ScheduledSequence, StepPlan
from baton.executor.batch import make_batch
from baton.kernels.attention import (
    AttentionBatch,
    DecodeGroup,
    PromptChunk,
    Workspace,
    attend,
)
from baton.kernels.attention_mask import band_mask
from baton.kernels.attention_scores import Scoring
from baton.kernels.kv_pool import layer_views, run_index, slot_index, write_kv

LAYERS, KV_HEADS, HEADS, HEAD_DIM, BLOCKS = 3, 2, 6, 8, 30
PLAIN = Scoring(HEAD_DIM**-0.5)
SINKS = torch.linspace(-1, 2, HEADS)
SAMPLING = SamplingParams()


def written_out(
    q: Tensor, k: Tensor, v: Tensor, start: int, window: int | None = None, how: Scoring = PLAIN
) -> Tensor:
    """Return attention [tokens, heads × head_dim] of q [tokens, ..] from `start` over k and v."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    for token in range(q.shape[0]):
        end = start + token + 1
        seen = slice(0 if window is None else max(0, end - window), end)
        for head in range(HEADS):
            kv_head = head // (HEADS // k.shape[1])
            scores = k[seen, kv_head].double() @ q[token, head].double() * how.scale
            if how.softcap is not None:
                scores = how.softcap * (scores / how.softcap).tanh()
            shares = scores.exp()
            total = shares.sum()
            if how.sinks is not None:
                total += how.sinks[head].double().exp()
            out[token, head] = shares / total @ v[seen, kv_head].double()
    return out.flatten(1).float()


class Pool:
    """A pool full of noise, and sequences whose KV lies in scattered blocks of it."""

    def __init__(self, block_size: int) -> None:
        torch.manual_seed(block_size)
        self.block_size = block_size
        self.tensor = torch.randn(BLOCKS, LAYERS, 2, KV_HEADS, block_size, HEAD_DIM)
        self._free = random.Random(block_size).sample(range(BLOCKS), BLOCKS)

    def add(self, length: int, layer: int) -> tuple[list[int], Tensor, Tensor]:
        """Return the blocks, K and V [length, kv_heads, head_dim] of a new sequence."""
        table = [self._free.pop() for _ in range(-(-length // self.block_size))]
        kv = self.tensor[table, layer].permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :length]
        return table, kv[0].clone(), kv[1].clone()

    def runs(self, tables: list[list[int]]) -> Tensor:
        return run_index(torch.tensor(tables), LAYERS, 2 * KV_HEADS).flatten()


@pytest.mark.parametrize("block_size", [8, 16])
@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_ragged_batch(block_size: int, layer: int) -> None:
    pool, workspace = Pool(block_size), Workspace()
    lengths = [37, 20, 1]
    decodes = [pool.add(length, layer) for length in lengths]
    table, k, v = pool.add(29, layer)
    whole_table, whole_k, whole_v = pool.add(11, layer)
    width = len(decodes[0][0])
    past = torch.arange(width * block_size) >= torch.tensor(lengths)[:, None]
    keys, rows = torch.arange(29), torch.arange(17, 29)[:, None]
    batch = AttentionBatch(
        slots=torch.empty(0, dtype=torch.int64),
        decodes=(
            DecodeGroup(
                start=0,
                end=3,
                runs=pool.runs([t + t[-1:] * (width - len(t)) for t, _, _ in decodes]),
                mask=torch.zeros(past.shape).masked_fill(past, -math.inf)[:, None, None],
            ),
        ),
        chunks=(
            PromptChunk(
                start=3,
                end=15,
                runs=pool.runs([table]),
                first=0,
                length=29,
                window=None,
                mask=torch.zeros(12, 29).masked_fill(keys > rows, -math.inf),
            ),
            PromptChunk(
                start=15,
                end=26,
                runs=pool.runs([whole_table]),
                first=0,
                length=11,
                window=None,
                mask=None,
            ),
        ),
    )
    q = torch.randn(26, HEADS + 1, HEAD_DIM)[:, :HEADS]
    found = attend(q, layer_views(pool.tensor)[layer], batch, PLAIN, workspace)
    expected = [
        written_out(q[i : i + 1], k, v, n - 1)
        for i, (n, (_, k, v)) in enumerate(zip(lengths, decodes, strict=True))
    ]
    expected += [written_out(q[3:15], k, v, 17), written_out(q[15:], whole_k, whole_v, 0)]
    torch.testing.assert_close(found, torch.cat(expected))


@pytest.mark.parametrize("window", [None, 1, 5, 8, 23, 400])
@pytest.mark.parametrize("how", [PLAIN, Scoring(0.3, softcap=0.7), Scoring(0.4, sinks=SINKS)])
def test_windows_caps_and_sinks(
    window: int | None, how: Scoring, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the executor lays them out, with tiles so small that chunks have several."""
    monkeypatch.setattr("baton.kernels.attention.TILE_ROWS", 7)
    monkeypatch.setattr("baton.executor.batch.TILE_ROWS", 7)
    pool = Pool(8)
    new = {60: 1, 37: 20, 25: 25, 3: 1, 40: 1}  # by length: how many tokens of it are new
    sequences = [(length, count, *pool.add(length, 1)) for length, count in new.items()]
    plan = StepPlan(
        0,
        tuple(
            ScheduledSequence(
                SeqId(i),
                tuple(range(length - count, length)),
                length - count,
                tuple(BlockId(block) for block in table),
                False,
                SAMPLING,
            )
            for i, (length, count, table, _, _) in enumerate(sequences)
        ),
    )
    layout = KVLayout(LAYERS, KV_HEADS, 8, HEAD_DIM, "float32")
    batch = make_batch(plan, layout, windows=(window,)).model
    q = torch.randn(48, HEADS, HEAD_DIM)
    found = attend(q, layer_views(pool.tensor)[1], batch.attention[window], how, Workspace())
    row = 0
    for length, count, _, k, v in sorted(sequences, key=lambda one: (one[1] > 1, -one[0])):
        expected = written_out(q[row : row + count], k, v, length - count, window, how)
        torch.testing.assert_close(found[row : row + count], expected)
        row += count


def test_a_pool_of_one_part_gives_keys_and_values_at_once() -> None:
    pool = torch.randn(4, LAYERS, 1, 1, 8, HEAD_DIM)
    kv = pool[[2, 0], 1].reshape(16, 1, HEAD_DIM)[:13]
    batch = AttentionBatch(
        slots=torch.empty(0, dtype=torch.int64),
        decodes=(),
        chunks=(
            PromptChunk(
                0, 13, run_index(torch.tensor([[2, 0]]), LAYERS, 1).flatten(), 0, 13, None, None
            ),
        ),
    )
    q = torch.randn(13, HEADS, HEAD_DIM)
    found = attend(q, layer_views(pool)[1], batch, PLAIN, Workspace())
    torch.testing.assert_close(found, written_out(q, kv, kv, 0))


def test_a_band_serves_every_smaller_tile_by_its_corner() -> None:
    band = band_mask(5, 9, 4, dtype=torch.float32, device="cpu")
    assert (band == 0).sum(-1).tolist() == [4] * 5
    assert (band[-1, -4:] == 0).all()
    assert torch.equal(band[2:, 3:], band_mask(3, 6, 4, dtype=torch.float32, device="cpu"))
    assert torch.equal(
        band_mask(3, 3, None, dtype=torch.float32, device="cpu") == 0, torch.ones(3, 3).tril() == 1
    )


@pytest.mark.parametrize("layer", range(LAYERS))
def test_write_kv_changes_the_slots_of_its_tokens_only(layer: int) -> None:
    pool = torch.zeros(BLOCKS, LAYERS, 2, KV_HEADS, 8, HEAD_DIM)
    blocks, offsets = torch.tensor([7, 7, 29, 0]), torch.tensor([3, 4, 7, 0])
    slots = slot_index(blocks, offsets, layers=LAYERS, per_layer=2 * KV_HEADS, block_size=8)
    kv = torch.randn(4, 2 * KV_HEADS + 3, HEAD_DIM)[:, 3:]
    write_kv(layer_views(pool)[layer], slots, kv)
    expected = torch.zeros_like(pool)
    for token, (block, offset) in enumerate(zip(blocks, offsets, strict=True)):
        expected[block, layer, :, :, offset] = kv[token].view(2, KV_HEADS, HEAD_DIM)
    assert torch.equal(pool, expected)


def test_the_workspace_grows_and_is_kept() -> None:
    workspace, like = Workspace(), torch.zeros(1, 4)
    first = workspace.take(like, 10)
    assert first.shape == (10, 4)
    assert workspace.take(like, 3).data_ptr() == first.data_ptr()
    assert workspace.take(like, 11).shape == (11, 4)
