"""Meshes whose steps the host leads, on what stands in for GPUs: the tokens of one rank."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from baton.core.config import EngineConfig, WorkerConfig
from baton.core.kv_layout import KVLayout
from baton.core.memory import MIB
from baton.core.topology import Role
from baton.engine.step import LayerWatch, StepPlan
from baton.executor.follower import _settle, _settled
from baton.executor.gpu_led import room_led_by_host
from baton.executor.gpu_start import Gpu
from baton.executor.kv_cache import KVCache
from baton.executor.late_device import LateDevice
from baton.executor.late_queue import LateQueue
from baton.executor.runner import ModelRunner
from baton.models.decoder import Decoder
from baton.models.loader import load_model
from tests.executor.test_gpu_mesh_runner import ENGINE, of_torch, served
from tests.executor.test_run_ahead import mixed_requests

LED = ENGINE.model_copy(update={"run_ahead": None})
EXPERTS = {"num_local_experts": 4, "vocab_size": 512}


@pytest.mark.parametrize("axis", ["pp", "ep", "cp"])
async def test_tokens_are_those_of_one_rank_by_torch(
    processes: Any,
    tmp_path: Path,
    tiny_llama_dir: Path,
    write_model: Callable[..., Path],
    axis: str,
) -> None:
    folder = write_model(tmp_path, "mixtral", **EXPERTS) if axis == "ep" else tiny_llama_dir
    requests = mixed_requests(load_model(folder, executor="torch"))[:4]
    ranks = served(processes, folder, requests, [64, 40], axis, LED)
    assert ranks[0].tokens == await of_torch(folder, requests)
    assert [rank.replays for rank in ranks] == [0, 0]
    told = [[line for line in rank.said if line.startswith("KV pool")] for rank in ranks]
    assert told[0] == told[1], "ranks have pools of different sizes"
    measured = [line for line in ranks[1].said if line.startswith("GPU memory")]
    assert "of 40 MiB" in measured[0]


def test_the_largest_steps_are_measured_at_every_place(
    tmp_path: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans: list[StepPlan] = []
    monkeypatch.setattr(ModelRunner, "compute", lambda self, plan: plans.append(plan))
    model = load_model(tiny_llama_dir, executor="torch")
    assert isinstance(model, Decoder)
    config = WorkerConfig(
        instance_id="mixed-0",
        role=Role.MIXED,
        model_dir=tiny_llama_dir,
        model_name="tiny",
        engine=EngineConfig(block_size=8, max_sequences=5, max_batch_tokens=64, max_model_len=256),
        parallel={"ep": 2},
    )
    layout = model.share.kv(model.spec, 8, model.dtype).layout
    queue = LateQueue()
    room = room_led_by_host(Gpu(queue, Roomy(), None), config, model, layout, 3 * MIB, print)
    queue.close()
    assert room.blocks == (int(0.9 * 64 * MIB) - (10 + 8 + 3) * MIB) // layout.block_bytes
    blocks = 64 // 8 + 5 + 1
    for plan, tokens, most in zip(plans, (64, 64, 5), (64, 256, 1), strict=True):
        for place in range(2):
            own = [s for s in plan.sequences if s.blocks[0] // blocks == place]
            assert sum(len(s.tokens) for s in own) == tokens
            assert max(s.end for s in own) == most


class Roomy:
    """A device of 64 MiB on which every run takes 8."""

    def total(self) -> int:
        return 64 * MIB

    def used(self) -> int:
        return 10 * MIB

    def peak(self, work: Callable[[], None]) -> int:
        work()
        return 8 * MIB


def test_layers_are_told_of_once_a_device_has_them() -> None:
    """A rank that follows has no PacedRunner: what it tells of, others read at once."""
    device = LateDevice(hides=True)
    layout = KVLayout(2, 1, 8, 4, "float32")
    kv = KVCache(layout, 2, memory=device.allocate(2 * layout.block_bytes))
    told: list[bool] = []
    watch = _settled(device, LayerWatch((1,), lambda _: told.append(bool((kv.tensor == 3).all()))))
    assert watch is not None
    kv.tensor.fill_(3)
    watch.reached(1)
    _settle(device)
    assert told == [True]
    device.check()
    assert _settled(None, None) is None
