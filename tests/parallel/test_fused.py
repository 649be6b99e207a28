"""The call against its parts."""

import pytest
import torch
from torch import Tensor

from baton.parallel.fused import all_reduce_add_norm
from baton.parallel.group import Ranks
from baton.parallel.mesh import Mesh, Place

from .ranks import RankProcesses

TOKENS, HIDDEN, EPS = 301, 1024, 1e-5  # in several passes


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def one_layer(ranks: Ranks, place: Place) -> bytes:
    residual = drawn(100, TOKENS, HIDDEN)
    normed = all_reduce_add_norm(
        ranks.tp, drawn(place.tp, TOKENS, HIDDEN), residual, drawn(101, HIDDEN), EPS
    )
    return torch.stack((normed, residual)).numpy().tobytes()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_it_is_the_sum_the_residual_and_the_norm(processes: RankProcesses, size: int) -> None:
    found = processes.run(Mesh(tp=size), one_layer)
    assert found == [found[0]] * size
    partial = torch.stack([drawn(rank, TOKENS, HIDDEN).double() for rank in range(size)]).sum(0)
    residual = drawn(100, TOKENS, HIDDEN).double() + partial
    normed = residual / (residual.square().mean(-1, keepdim=True) + EPS).sqrt()
    expected = normed * drawn(101, HIDDEN).double()
    both = torch.frombuffer(bytearray(found[0]), dtype=torch.float32).view(2, TOKENS, HIDDEN)
    torch.testing.assert_close(
        both.double(), torch.stack((expected, residual)), rtol=1e-5, atol=1e-5
    )
