"""Ranks that compute as GPUs would, each in a process: the tokens of one rank, and of torch."""

from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from baton.core.config import EngineConfig, HandoverConfig, ParallelConfig, WorkerConfig
from baton.core.errors import InstanceLost, InternalError
from baton.core.ids import Incarnation, SeqId
from baton.core.request import GenerateRequest
from baton.core.topology import Role
from baton.engine.step import LayerWatch, StepPlan, StepResult
from baton.executor.gpu_mesh_runner import GpuFollowing, GpuMeshRunner
from baton.executor.rank_group import RankGroup
from baton.executor.runner import ModelRunner
from baton.models.loader import load_model
from baton.parallel.mesh import Mesh
from tests.executor.engine_world import EngineWorld
from tests.executor.gpu_ranks import Served, serve
from tests.executor.test_run_ahead import SAMPLINGS, mixed_requests

ENGINE = EngineConfig(
    device="cpu",
    executor="torch",
    block_size=8,
    max_batch_tokens=32,
    max_sequences=6,
    cuda_graph_sizes=(2, 4),
    gpu_memory_utilization=0.5,
    run_ahead=True,
)


@pytest.fixture
def requests(tiny_llama_dir: Path) -> list[GenerateRequest]:
    """Sampled on the device, and two that the host has to sample; chunks beside decodes."""
    drawn = mixed_requests(load_model(tiny_llama_dir, executor="torch"))
    device = [replace(r, sampling=SAMPLINGS[i % 3]) for i, r in enumerate(drawn[:3])]
    host = [replace(r, sampling=SAMPLINGS[3 + i], max_tokens=4) for i, r in enumerate(drawn[6:])]
    return host + device


async def of_torch(folder: Path, requests: Sequence[GenerateRequest]) -> list[list[int]]:
    model = load_model(folder, executor="torch")
    world = EngineWorld(
        model,
        lambda kv: ModelRunner(model, kv),
        num_blocks=64,
        depth=1,
        ahead=False,
        block_size=8,
        max_batch_tokens=32,
        max_sequences=6,
    )
    return await world.serve(requests)


def served(
    processes: Any,
    folder: Path,
    requests: Sequence[GenerateRequest],
    mib: list[int],
    axis: str = "tp",
    engine: EngineConfig = ENGINE,
) -> list[Served]:
    config = WorkerConfig(
        instance_id="mixed-0",
        role=Role.MIXED,
        model_dir=folder,
        model_name="tiny",
        engine=engine,
        parallel=ParallelConfig(**{axis: len(mib)}),
        handover=HandoverConfig(secret="a secret of this cluster"),
    )
    mesh, given = Mesh(**{axis: len(mib)}), config.model_dump_json()
    found: list[Served] = processes.run(mesh, serve, given, requests, mib)
    assert [one.failure for one in found] == [""] * len(mib)
    return found


async def test_tokens_are_those_of_one_rank_and_of_torch(
    processes: Any, tiny_llama_dir: Path, requests: list[GenerateRequest]
) -> None:
    (alone,) = served(processes, tiny_llama_dir, requests, [64])
    ranks = served(processes, tiny_llama_dir, requests, [64, 40])
    expected = await of_torch(tiny_llama_dir, requests)
    assert alone.tokens == ranks[0].tokens == expected
    assert ranks[0].replays == ranks[1].replays > 10
    told = [[line for line in r.said if line.startswith(("captured", "KV pool"))] for r in ranks]
    assert told[0] == told[1]
    # Of 40 MiB half, less a tenth, at 4 KiB; the options of sampling take some of it.
    blocks = int(told[0][0].split()[2])
    assert 3900 < blocks < 4096


class Launches:
    """Stands in for GpuRunner: a step ends when its future is set."""

    def __init__(self) -> None:
        self.steps: list[Future[StepResult]] = []
        self.most = 0

    def execute(self, plan: StepPlan, watch: LayerWatch | None = None) -> Future[StepResult]:
        if watch is not None:
            watch.reached(watch.ends[0])
        self.steps.append(Future())
        self.most = max(self.most, sum(not step.done() for step in self.steps))
        return self.steps[-1]


@pytest.fixture
async def group() -> AsyncIterator[RankGroup]:
    """Of the leader alone; what ends it is kept."""
    config = WorkerConfig(
        instance_id="mixed-0", role=Role.MIXED, model_dir=Path(), model_name="none"
    )
    lost: list[InstanceLost] = []
    group = RankGroup(config, Incarnation(1), lost.append)
    group.lost = lost  # type: ignore[attr-defined]
    yield group
    await group.close()


def test_the_leaders_result_is_that_of_the_step(group: Any) -> None:
    own = Launches()
    runner = GpuMeshRunner(own, group)  # type: ignore[arg-type]
    first, second, third = (runner.execute(StepPlan(n, ())) for n in range(3))
    own.steps[0].set_result(StepResult(0, {SeqId(5): 9}))
    own.steps[1].set_result(StepResult(1, {}, unsound=(SeqId(5),)))
    assert first.result(20).tokens == {5: 9}
    assert second.result(20).unsound == (5,)
    assert not group.lost
    own.steps[2].set_exception(RuntimeError("the GPU is gone"))
    assert not third.done()
    assert "failed in step 2: RuntimeError('the GPU is gone')" in str(group.lost[0])


def test_layers_that_are_launched_are_not_forgotten_when_the_step_before_ends(group: Any) -> None:
    """Other ranks must have computed these before they digest them."""
    own, reached = Launches(), list[int]()
    runner = GpuMeshRunner(own, group)  # type: ignore[arg-type]
    runner.execute(StepPlan(0, ()))
    runner.execute(StepPlan(1, ()), LayerWatch((3, 4), reached.append))
    own.steps[0].set_result(StepResult(0, {}))
    assert reached == [3]
    assert group.progress == (1, 3)


def test_a_rank_that_follows_has_no_more_steps_under_way_than_its_leader() -> None:
    own, ended = Launches(), list[tuple[int, BaseException | None]]()
    following = GpuFollowing(own, None, 2, lambda *told: ended.append(told))  # type: ignore[arg-type]
    following.launch(StepPlan(0, ()), None)
    following.launch(StepPlan(1, ()), None)
    with ThreadPoolExecutor(1) as thread:
        third = thread.submit(following.launch, StepPlan(2, ()), None)
        own.steps[0].set_result(StepResult(0, {}))
        third.result(20)
    assert own.most == 2
    error = InternalError("not finite")
    own.steps[1].set_exception(error)
    own.steps[2].set_result(StepResult(2, {}))
    following.close()
    assert ended == [(0, None), (1, error), (2, None)]
