"""The call against its parts."""

import pytest
import torch
from torch import Tensor

from baton.parallel.fused import all_reduce_add_norm
from baton.parallel.group import Ranks
from baton.parallel.mesh import Mesh, Place

from .ranks import RankProcesses

TOKENS, HIDDEN, EPS = 5, 96, 1e-5


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def one_layer(ranks: Ranks, place: Place) -> tuple[list[float], list[float]]:
    residual = drawn(100, TOKENS, HIDDEN)
    normed = all_reduce_add_norm(
        ranks.tp, drawn(place.tp, TOKENS, HIDDEN), residual, drawn(101, HIDDEN), EPS
    )
    return normed.flatten().tolist(), residual.flatten().tolist()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_it_is_the_sum_the_residual_and_the_norm(processes: RankProcesses, size: int) -> None:
    found = processes.run(Mesh(tp=size), one_layer)
    assert found == [found[0]] * size
    partial = torch.stack([drawn(rank, TOKENS, HIDDEN).double() for rank in range(size)]).sum(0)
    residual = drawn(100, TOKENS, HIDDEN).double() + partial
    normed = residual / (residual.square().mean(-1, keepdim=True) + EPS).sqrt()
    expected = normed * drawn(101, HIDDEN).double()
    for tensor, reference in zip(found[0], (expected, residual), strict=True):
        torch.testing.assert_close(
            torch.tensor(tensor).double(), reference.flatten(), rtol=1e-5, atol=1e-5
        )
