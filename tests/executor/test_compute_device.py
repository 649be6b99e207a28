from pathlib import Path

import pytest
import torch

from baton.core.config import EngineConfig, ParallelConfig, WorkerConfig
from baton.core.errors import InvalidConfig
from baton.core.topology import Role
from baton.executor.compute_device import (
    StepsUnderWay,
    compute_device,
    led_by_host,
    steps_under_way,
)


def config(parallel: ParallelConfig | None = None, **engine: object) -> WorkerConfig:
    return WorkerConfig(
        instance_id="decode-0",
        role=Role.DECODE,
        model_dir=Path(),
        model_name="tiny",
        engine=EngineConfig(**engine),
        parallel=parallel or ParallelConfig(),
    )


def gpus(monkeypatch: pytest.MonkeyPatch, *, there: bool, count: int = 1) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def test_a_gpu_is_taken_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, there=True)
    assert compute_device(config()) == torch.device("cuda", 0)
    assert compute_device(config(device="cpu")) == torch.device("cpu")
    gpus(monkeypatch, there=False)
    assert compute_device(config()) == torch.device("cpu")
    with pytest.raises(InvalidConfig, match="device: 'cuda'"):
        compute_device(config(device="cuda"))


@pytest.mark.parametrize(
    ("field", "more"),
    [
        ("executor", {"executor": "native"}),
        ("batch_invariant", {"batch_invariant": True}),
    ],
)
def test_what_a_gpu_cannot_do_stays_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, field: str, more: dict[str, object]
) -> None:
    gpus(monkeypatch, there=True)
    assert compute_device(config(**more)) == torch.device("cpu")  # type: ignore[arg-type]
    with pytest.raises(InvalidConfig, match=f"{field}: "):
        compute_device(config(device="cuda", **more))  # type: ignore[arg-type]


@pytest.mark.parametrize("parallel", [{"pp": 2}, {"dp": 2}, {"ep": 2, "tp": 2}, {"cp": 4}])
def test_the_host_leads_stages_places_and_rings_on_gpus(
    monkeypatch: pytest.MonkeyPatch, parallel: dict[str, int]
) -> None:
    gpus(monkeypatch, there=True)
    mesh = ParallelConfig(**parallel)
    assert led_by_host(mesh)
    assert not led_by_host(ParallelConfig(tp=8))
    assert compute_device(config(mesh)).type == "cuda"
    assert not steps_under_way(config(mesh), on_gpu=True).ahead
    with pytest.raises(InvalidConfig, match=r"attention_skip_below: .* 0 with pp, dp, ep or cp"):
        compute_device(config(mesh, attention_skip_below=1e-4))


def test_keys_are_left_out_on_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, there=True)
    assert compute_device(config(attention_skip_below=1e-4)).type == "cuda"
    with pytest.raises(InvalidConfig, match=r"attention_skip_below: .*0\.0001.* 0 on the CPU"):
        compute_device(config(attention_skip_below=1e-4, device="cpu"))


@pytest.mark.parametrize(
    ("seen", "taken"), [(1, [0, 0, 0, 0]), (2, [0, 1, 0, 1]), (8, [0, 1, 2, 3])]
)
def test_each_rank_takes_a_gpu_of_those_it_sees(
    monkeypatch: pytest.MonkeyPatch, seen: int, taken: list[int]
) -> None:
    gpus(monkeypatch, there=True, count=seen)
    given = config(ParallelConfig(tp=4))
    found = [compute_device(given.model_copy(update={"rank": rank})) for rank in range(4)]
    assert found == [torch.device("cuda", index) for index in taken]


def test_steps_under_way() -> None:
    assert steps_under_way(config(), on_gpu=False) == StepsUnderWay(1, ahead=False)
    assert steps_under_way(config(), on_gpu=True) == StepsUnderWay(2, ahead=True)
    assert steps_under_way(config(run_ahead=True), on_gpu=False) == StepsUnderWay(2, ahead=True)
    assert steps_under_way(config(run_ahead=False), on_gpu=True) == StepsUnderWay(1, ahead=False)
    stages = ParallelConfig(pp=3)
    assert steps_under_way(config(stages), on_gpu=False) == StepsUnderWay(3, ahead=False)
    for parallel in (stages, ParallelConfig(cp=2)):
        with pytest.raises(InvalidConfig, match="run_ahead: 'true'"):
            steps_under_way(config(parallel, run_ahead=True), on_gpu=False)
