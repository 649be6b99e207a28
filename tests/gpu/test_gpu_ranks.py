"""An instance of several ranks, each on a GPU of its own; skipped with fewer than two.

Sums are added up in another order than on one GPU: in float32 the tokens of a random model are the
same nevertheless.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from baton.core.config import EngineConfig, HandoverConfig, ParallelConfig, WorkerConfig
from baton.core.topology import Role
from baton.models.loader import load_model
from baton.parallel.mesh import Mesh

from ..executor.gpu_ranks import Served, serve  # noqa: TID252
from ..executor.test_run_ahead import mixed_requests  # noqa: TID252
from ..parallel.ranks import RankProcesses  # noqa: TID252

GPUS = torch.cuda.device_count()
pytestmark = pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")


@pytest.fixture(scope="module")
def rank_processes() -> Iterator[RankProcesses]:
    with RankProcesses() as processes:  # the instance joins NCCL by itself
        yield processes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, write_llama: Callable[..., Path]) -> Path:
    return write_llama(tmp_path_factory.mktemp("checkpoint") / "llama")


@pytest.mark.parametrize("sizes", [(1, 2, 4), ()], ids=["captured", "launched"])
@pytest.mark.parametrize("tp", [size for size in (2, 4, 8) if size <= GPUS])
def test_tokens_are_those_of_one_gpu(
    rank_processes: RankProcesses, folder: Path, tp: int, sizes: tuple[int, ...]
) -> None:
    requests = mixed_requests(load_model(folder, executor="torch"))

    def tokens(ranks: int) -> list[list[int]]:
        config = WorkerConfig(
            instance_id="mixed-0",
            role=Role.MIXED,
            model_dir=folder,
            model_name="random",
            engine=EngineConfig(
                device="cuda", max_sequences=6, kv_memory_mib=64, cuda_graph_sizes=sizes
            ),
            parallel=ParallelConfig(tp=ranks),
            handover=HandoverConfig(secret="a secret of this cluster"),
        )
        given = config.model_dump_json()
        found: list[Served] = rank_processes.run(Mesh(tp=ranks), serve, given, requests, None)
        told = [[line for line in one.said if line.startswith("captured")] for one in found]
        assert told == [told[0]] * ranks
        assert [one.failure for one in found] == [""] * ranks
        return found[0].tokens

    assert tokens(tp) == tokens(1)
