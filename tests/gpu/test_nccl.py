"""What every group does, between GPUs; skipped with fewer than two.

The checks are those of tests/parallel/test_group.py, on tensors of the rank's GPU.
"""

from collections.abc import Iterator

import pytest
import torch

from baton.core.errors import InvalidConfig
from baton.parallel.counted_group import CountedGroup
from baton.parallel.group import Group, Ranks
from baton.parallel.join import Meeting, join_mesh
from baton.parallel.mesh import Mesh, Place
from baton.parallel.symmetric_group import SymmetricGroup
from baton.parallel.torch_group import NcclGroup

from ..parallel.ranks import RankProcesses  # noqa: TID252
from ..parallel.test_group import CHECKS, TYPES  # noqa: TID252

GPUS = torch.cuda.device_count()
needs_gpus = pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
SIZES = [size for size in (2, 3, 4, 8) if size <= GPUS] or [2]


@pytest.fixture(scope="module")
def gpu_processes() -> Iterator[RankProcesses]:
    with RankProcesses("nccl") as processes:
        yield processes


def library(group: Group) -> NcclGroup:
    assert isinstance(group, CountedGroup)
    below = group.below
    if isinstance(below, SymmetricGroup):
        below = below.below
    assert isinstance(below, NcclGroup)
    return below


def check_all(ranks: Ranks, place: Place, name: str) -> None:
    group = ranks.tp if name == "as joined" else library(ranks.tp)
    with torch.device("cuda", torch.cuda.current_device()):
        for check in CHECKS:
            check(group)


@needs_gpus
@pytest.mark.parametrize("name", ["as joined", "library"])
@pytest.mark.parametrize("size", SIZES)
def test_every_collective_moves_and_adds_what_it_says(
    gpu_processes: RankProcesses, size: int, name: str
) -> None:
    gpu_processes.run(Mesh(tp=size), check_all, name)


def random_sums(ranks: Ranks, place: Place) -> list[bytes]:
    random = torch.Generator().manual_seed(100 + place.tp)
    sums = []
    for dtype in TYPES[:2]:
        for length in (8, 1024, 70_000, 1 << 20):
            x = torch.randn(length, generator=random).to(dtype).cuda()
            sums.append(ranks.tp.all_reduce_(x).view(torch.uint8).cpu().numpy().tobytes())
    return sums


@needs_gpus
def test_a_sum_has_the_same_bits_on_every_rank(gpu_processes: RankProcesses) -> None:
    found = gpu_processes.run(Mesh(tp=SIZES[-1]), random_sums)
    assert found == [found[0]] * SIZES[-1]


def exchange_and_compute(ranks: Ranks, place: Place) -> float:
    group, rows = ranks.cp, 1 << 20
    x = torch.full((rows * group.size,), float(group.rank), device="cuda")
    begun = group.start_all_to_all(x, [rows] * group.size, [rows] * group.size)
    busy = torch.randn(2048, 2048, device="cuda")
    for _ in range(20):
        busy = (busy @ busy).tanh()
    parts = begun.wait().view(group.size, rows)
    expected = torch.arange(group.size, device="cuda", dtype=torch.float32)[:, None]
    return float((parts - expected).abs().max())


@needs_gpus
def test_an_exchange_runs_beside_the_compute(gpu_processes: RankProcesses) -> None:
    assert gpu_processes.run(Mesh(cp=2), exchange_and_compute) == [0.0, 0.0]


@pytest.mark.parametrize("device", [None, torch.device("cpu"), torch.device("cuda")])
def test_nccl_needs_a_gpu_with_a_number(device: torch.device | None) -> None:
    meeting = Meeting(Mesh(tp=2), "127.0.0.1", 1, "nccl", 1.0)
    with pytest.raises(InvalidConfig, match="a GPU and its number, with the library nccl"):
        join_mesh(meeting, 1, None, device)


def test_nccl_needs_a_gpu_that_is_there() -> None:
    meeting = Meeting(Mesh(tp=2), "127.0.0.1", 1, "nccl", 1.0)
    with pytest.raises(InvalidConfig, match=f"one of the {GPUS} GPUs that this process sees"):
        join_mesh(meeting, 1, None, torch.device("cuda", GPUS))
