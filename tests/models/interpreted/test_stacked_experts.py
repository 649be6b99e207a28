"""Experts in MXFP4, computed as they are, against the same ones read as floats."""

from pathlib import Path

import pytest
import torch

from baton.kernels.backend import Backend, using_backend
from baton.models.blocks.experts import load_experts
from baton.models.blocks.stacked_experts import keeps_mxfp4, read_mxfp4
from baton.models.weights import Checkpoint
from tests.models.blocks.test_experts import EXPERTS, HIDDEN, STACKED, Seat, write_mxfp4


@pytest.mark.parametrize("seat", [Seat(0, 1), Seat(0, 5), Seat(3, 5)])
def test_mxfp4_is_computed_as_it_is(tmp_path: Path, seat: Seat) -> None:
    write_mxfp4(tmp_path)
    checkpoint = Checkpoint(tmp_path, torch.float32)
    assert keeps_mxfp4(STACKED, checkpoint, "experts", seat)
    assert not keeps_mxfp4(STACKED, checkpoint, "experts", Seat(0, 2)), "within a group"
    experts = load_experts(STACKED, checkpoint, "experts", HIDDEN, seat, range(EXPERTS))
    random = torch.Generator().manual_seed(2)
    x = torch.randn((5, HIDDEN), generator=random)
    weights = torch.rand((5, 2), generator=random)
    chosen = torch.tensor([[0, 2], [1, 0], [2, 1], [2, 0], [1, 2]], dtype=torch.int32)
    with using_backend(Backend.TRITON):
        stacked = read_mxfp4(STACKED, checkpoint, "experts", HIDDEN, seat)
        found = stacked(x, chosen, weights)
    for token in range(5):
        row = x[token : token + 1]
        answers = [experts[int(expert)](row)[0] for expert in chosen[token]]
        expected = sum(w * a for w, a in zip(weights[token], answers, strict=True))
        assert (found[token] - expected).norm() / expected.norm() < 2e-6
