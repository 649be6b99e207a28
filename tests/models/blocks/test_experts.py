"""Ranks' parts of experts add up to the experts, whatever they are kept as."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from baton.models.blocks.experts import load_experts
from baton.models.blocks.mxfp4 import dequantise
from baton.models.decoder_spec import ExpertNames, MoeSpec, RoutingSpec
from baton.models.weights import Checkpoint
from baton.parallel.group import SoloGroup

EXPERTS, HIDDEN, WIDTH = 3, 64, 160
"""A half or a quarter of the width begins within a group of MXFP4 values."""
STACKED = MoeSpec(
    RoutingSpec(EXPERTS, 2),
    WIDTH,
    ExpertNames("router", "experts", stacked=True),
    swiglu_limits=(1.7, 7.0),
)
APART = MoeSpec(RoutingSpec(EXPERTS, 2), WIDTH, ExpertNames())


class Seat(SoloGroup):
    """A place in a group; loading calls no collective."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) / 8


def write_floats(folder: Path) -> None:
    stacks = {
        "experts.gate_up_proj": random(EXPERTS, HIDDEN, 2 * WIDTH),
        "experts.gate_up_proj_bias": random(EXPERTS, 2 * WIDTH),
        "experts.down_proj": random(EXPERTS, WIDTH, HIDDEN),
        "experts.down_proj_bias": random(EXPERTS, HIDDEN),
    }
    save_file(stacks, folder / "model.safetensors")


def write_mxfp4(folder: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = {
        "experts.gate_up_proj_bias": random(EXPERTS, 2 * WIDTH),
        "experts.down_proj_bias": random(EXPERTS, HIDDEN),
    }
    for name, rows, width in (("gate_up", 2 * WIDTH, HIDDEN), ("down", HIDDEN, WIDTH)):
        shape = (EXPERTS, rows, width // 32)
        at = f"experts.{name}_proj"
        tensors[f"{at}_blocks"] = torch.randint(
            0, 256, (*shape, 16), generator=generator, dtype=torch.uint8
        )
        tensors[f"{at}_scales"] = torch.randint(
            120, 124, shape, generator=generator, dtype=torch.uint8
        )
    save_file(tensors, folder / "model.safetensors")


def write_apart(folder: Path) -> None:
    save_file(
        {
            f"experts.{expert}.{name}.weight": random(*shape) * (expert + 1)
            for expert in range(EXPERTS)
            for name, shape in {
                "gate_proj": (WIDTH, HIDDEN),
                "up_proj": (WIDTH, HIDDEN),
                "down_proj": (HIDDEN, WIDTH),
            }.items()
        },
        folder / "model.safetensors",
    )


@pytest.mark.parametrize("size", [1, 2, 4, 5])
@pytest.mark.parametrize(
    ("write", "spec"), [(write_floats, STACKED), (write_mxfp4, STACKED), (write_apart, APART)]
)
def test_parts_add_up(tmp_path: Path, write: object, spec: MoeSpec, size: int) -> None:
    assert callable(write)
    write(tmp_path)
    x = random(7, HIDDEN) * 8
    own = (2, 0)

    def load(rank: int, size: int) -> list[torch.Tensor]:
        checkpoint = Checkpoint(tmp_path, torch.float32)
        seat = Seat(rank, size)
        experts = load_experts(spec, checkpoint, "experts", HIDDEN, seat, own)
        checkpoint.finish(tie=False, layers=0, spare_layers=0)
        return [expert(x) for expert in experts]

    whole = load(0, 1)
    assert len(whole) == len(own)
    for parts in zip(whole, *(load(rank, size) for rank in range(size)), strict=True):
        torch.testing.assert_close(sum(parts[1:]), parts[0], rtol=1e-4, atol=1e-4)


def test_parts_of_mxfp4_are_parts_of_its_values(tmp_path: Path) -> None:
    """One expert with inputs that pick single columns out, written out by hand."""
    write_mxfp4(tmp_path)
    checkpoint = Checkpoint(tmp_path, torch.float32)
    blocks = checkpoint.take_bytes("experts.gate_up_proj_blocks", EXPERTS, 2 * WIDTH, 2, 16)
    scales = checkpoint.take_bytes("experts.gate_up_proj_scales", EXPERTS, 2 * WIDTH, 2)
    both = dequantise(blocks[1], scales[1])
    bias = checkpoint.take("experts.gate_up_proj_bias", EXPERTS, 2 * WIDTH)[1]
    expert = load_experts(STACKED, checkpoint, "experts", HIDDEN, Seat(1, 4), (1,))[0]
    found = expert.gate_up(torch.eye(HIDDEN))
    own = slice(2 * 40, 2 * 80)
    rows, shift = both[own], bias[own]
    expected = torch.cat([rows[0::2].T + shift[0::2], rows[1::2].T + shift[1::2]], dim=1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
