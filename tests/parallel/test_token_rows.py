"""Sums end on every rank for all tokens, or on each for its own; both are the same sums."""

from collections.abc import Sequence

import torch

from baton.parallel.group import Ranks, SoloGroup
from baton.parallel.mesh import Mesh, Place
from baton.parallel.token_rows import AllRows, OwnRows, token_rows

from .ranks import RankProcesses

TOKENS = (3, 4, 7, 64)


def partial(rank: int, tokens: int) -> torch.Tensor:
    return torch.arange(tokens * 5.0).view(tokens, 5) * (rank + 1)


class Doubled:
    """In place of a norm, which has an arithmetic of its own."""

    def add_(self, addends: Sequence[torch.Tensor], stream: torch.Tensor) -> torch.Tensor:
        return stream.add_(torch.stack(list(addends)).sum(0)).mul_(2)


def check(ranks: Ranks, place: Place) -> None:
    tp = ranks.tp
    for tokens in TOKENS:
        expected = sum(partial(rank, tokens) for rank in range(tp.size))
        for rows in (AllRows(tp, tokens), OwnRows(tp, tokens)):
            own = rows.reduce(partial(tp.rank, tokens))
            assert own.shape[0] == rows.count
            assert torch.equal(rows.gather(own), expected)
            stream = torch.ones_like(own)
            assert rows.add_norm_(partial(tp.rank, tokens), stream, Doubled()) is stream
            assert torch.equal(rows.gather(stream), 2 * (1 + expected))
    assert isinstance(token_rows(tp, 8, 8), OwnRows)
    assert isinstance(token_rows(tp, 7, 8), AllRows)
    assert isinstance(token_rows(tp, 1, 0), AllRows)  # some rank would have none


def test_sums_are_the_same_wherever_they_end(processes: RankProcesses) -> None:
    for size in (2, 3):
        processes.run(Mesh(tp=size), check)


def test_one_rank_has_all_rows() -> None:
    rows = token_rows(SoloGroup(), 1000, 0)
    x = partial(0, 1000)
    assert isinstance(rows, AllRows)
    assert rows.reduce(x) is x
    assert rows.gather(x) is x
