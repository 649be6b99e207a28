"""Keys that come part by part give what all keys at once give."""

import random
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from baton.kernels import online_softmax
from baton.kernels.attention_mask import band_mask
from baton.kernels.attention_scores import Scoring, weigh
from baton.kernels.online_softmax import OnlineAttention

HEADS, KV_HEADS, DIMS = 6, 2, 16
SCORINGS = {
    "plain": Scoring(0.25),
    "softcap": Scoring(0.25, softcap=2.0),
    "sinks": Scoring(0.25, sinks=torch.linspace(-1, 2, HEADS)),
}


def tensors(rows: int, keys: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(rows, HEADS, DIMS, generator=generator) * 3
    k, v = torch.randn(2, KV_HEADS, keys, DIMS, generator=generator)
    return q, k, v


def at_once(q: Tensor, k: Tensor, v: Tensor, window: int | None, scoring: Scoring) -> Tensor:
    """The rows are the tokens of the last keys."""
    mask = band_mask(q.shape[0], k.shape[1], window, dtype=q.dtype, device="cpu")
    return weigh(q.transpose(0, 1)[None], k[None], v[None], mask, scoring)[0].transpose(0, 1)


@pytest.mark.parametrize("scoring", SCORINGS.values(), ids=SCORINGS.keys())
@pytest.mark.parametrize("window", [None, 1, 7, 30])
@pytest.mark.parametrize("rows", [1, 9, 40])
def test_parts_in_any_order(rows: int, window: int | None, scoring: Scoring) -> None:
    q, k, v = tensors(rows, 40)
    online = OnlineAttention(q, 40 - rows, window, scoring)
    cuts = [0, 3, 4, 17, 33, 40]
    parts = list(pairwise(cuts))
    random.Random(rows).shuffle(parts)
    for start, end in parts:
        online.add(k[:, start:end], v[:, start:end], start)
    torch.testing.assert_close(online.result(), at_once(q, k, v, window, scoring))


def test_tiles_of_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(online_softmax, "_SCORES", 3 * HEADS * 30)
    q, k, v = tensors(25, 30)
    online = OnlineAttention(q, 5, 11, SCORINGS["plain"])
    online.add(k, v, 0)
    torch.testing.assert_close(online.result(), at_once(q, k, v, 11, SCORINGS["plain"]))


def test_scores_of_any_size() -> None:
    """Neither the first part nor a later one may overflow the exponential."""
    q, k, v = tensors(4, 8)
    k[:, 5] *= 1000
    online = OnlineAttention(q, 4, None, SCORINGS["plain"])
    online.add(k[:, 4:], v[:, 4:], 4)
    online.add(k[:, :4], v[:, :4], 0)
    torch.testing.assert_close(online.result(), at_once(q, k, v, None, SCORINGS["plain"]))


def test_half_precision_is_summed_in_float32() -> None:
    q, k, v = tensors(5, 64)
    expected = at_once(*(x.bfloat16().float() for x in (q, k, v)), None, SCORINGS["plain"])
    online = OnlineAttention(q.bfloat16(), 59, None, SCORINGS["plain"])
    for start in range(0, 64, 8):
        online.add(*(x[:, start : start + 8].bfloat16() for x in (k, v)), start)
    found = online.result()
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=2**-7, atol=1e-5)
