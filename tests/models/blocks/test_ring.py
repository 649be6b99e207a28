"""The ring computes while KV is under way; test_models_on_ranks says that it computes rightly."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from baton.kernels.attention import Workspace
from baton.kernels.attention_scores import Scoring
from baton.kernels.kv_pool import layer_views
from baton.models.blocks import ring
from baton.models.blocks.ring import Past, Ring, RingBatch, Segment
from baton.parallel.group import SoloGroup

SIZE, DIMS = 4, 8
RANKS = (0, 3)


class Sender(SoloGroup):
    """A place in a ring of four, whose peers send zeros; notes when it begins and when it waits."""

    size = SIZE

    def __init__(self, rank: int, events: list[str]) -> None:
        self.rank = rank
        self._events = events
        self._coming = torch.empty(0)

    def start_all_to_all(self, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> "Sender":
        self._events.append("begin")
        assert [to for to, rows in enumerate(sent) if rows] == [(self.rank + 1) % SIZE]
        assert [at for at, rows in enumerate(received) if rows] == [(self.rank - 1) % SIZE]
        self._coming = torch.zeros(sum(received), *x.shape[1:])
        return self

    def wait(self) -> Tensor:
        self._events.append("wait")
        return self._coming


def batch_of_one_prompt() -> tuple[RingBatch, Tensor]:
    """Eight tokens in one block: rank r has tokens r and 7 - r."""
    pool = torch.zeros(1, 1, 2, 1, 2 * SIZE, DIMS)
    segments, slots = [], []
    for rank in range(SIZE):
        own = (rank, 2 * SIZE - 1 - rank)
        segments.append(tuple(Segment(0, t, slice(i, i + 1)) for i, t in enumerate(own)))
        slots.append(torch.tensor([t + part * 2 * SIZE for t in own for part in (0, 1)]))
    past = Past(torch.zeros(2, 0, dtype=torch.int64), 0)
    return RingBatch(0, tuple(segments), tuple(slots), (past,)), pool


@pytest.mark.parametrize("rank", RANKS)
def test_what_a_rank_has_goes_on_before_it_is_computed_with(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    see = ring._see

    def noted(*arguments: Any) -> None:
        events.append("compute")
        see(*arguments)

    monkeypatch.setattr(ring, "_see", noted)
    batch, pool = batch_of_one_prompt()
    q, new, out = torch.randn(2, 1, DIMS), torch.randn(2, 2, DIMS), torch.zeros(2, DIMS)
    one = Ring(Sender(rank, events), batch, Workspace())
    one.attend_(out, q, new, layer_views(pool)[0], None, Scoring(1.0))
    assert events == ["begin", "compute", "wait"] * (SIZE - 1) + ["compute"]
    assert out.abs().sum() > 0
