"""Sizing the pool, capturing steps and starting an instance on a GPU, with all but CUDA."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from baton.core.config import EngineConfig, WorkerConfig
from baton.core.errors import InvalidConfig
from baton.core.memory import MIB
from baton.core.topology import Role
from baton.engine.step import EngineEvent, TokenSampled
from baton.executor.gpu_memory import MemoryUse, told_if_it_does_not_fit
from baton.executor.gpu_start import Gpu, graph_sizes, graph_tokens, measured_use
from baton.executor.instance import Instance
from baton.executor.kv_cache import make_layout
from baton.executor.late_queue import LateQueue
from baton.models.blocks.device_step import DeviceStep
from baton.models.decoder import Decoder
from baton.models.loader import load_model
from tests.executor.engine_world import request
from tests.executor.test_run_ahead import SAMPLINGS

USE = MemoryUse(total=1000 * MIB, loaded=300 * MIB, step=100 * MIB, captured=50 * MIB)


def test_the_pool_gets_what_is_left() -> None:
    assert USE.blocks(EngineConfig(gpu_memory_utilization=0.9), 2 * MIB) == (900 - 450) // 2
    assert USE.blocks(EngineConfig(kv_memory_mib=100), 2 * MIB) == 50
    staging = replace(USE, staged=64 * MIB)
    assert staging.blocks(EngineConfig(gpu_memory_utilization=0.9), 2 * MIB) == (900 - 514) // 2


def test_what_does_not_fit_is_told_with_the_numbers() -> None:
    with pytest.raises(
        InvalidConfig, match=r"kv_memory_mib: '?500.* at most 450.*step 100"
    ) as told:
        USE.blocks(EngineConfig(kv_memory_mib=500), 2 * MIB)
    assert "lower max_batch_tokens" in str(told.value)
    with pytest.raises(InvalidConfig, match=r"gpu_memory_utilization.*loaded take 300"):
        USE.blocks(EngineConfig(gpu_memory_utilization=0.4), 2 * MIB)


def test_memory_that_the_gpu_lacks_is_a_wrong_config() -> None:
    with (
        pytest.raises(InvalidConfig, match=r"max_batch_tokens: '?512.*tried to allocate 3 GiB"),
        told_if_it_does_not_fit("max_batch_tokens", 512, "less"),
    ):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. tried to allocate 3 GiB. More. Much more."
        )


def test_sizes_of_captured_steps() -> None:
    assert graph_sizes(EngineConfig(max_sequences=20)) == (1, 2, 4, 8, 16, 20)
    assert graph_sizes(EngineConfig(max_sequences=1)) == (1,)
    assert graph_sizes(EngineConfig(max_sequences=300))[-3:] == (256, 288, 300)
    assert graph_sizes(EngineConfig(cuda_graph_sizes=(16, 2, 500), max_sequences=64)) == (2, 16, 64)
    assert graph_sizes(EngineConfig(cuda_graph_sizes=())) == ()
    with pytest.raises(InvalidConfig, match="cuda_graph_sizes"):
        EngineConfig.checked(cuda_graph_sizes=(0,))


def test_the_largest_prompts_are_also_those_at_the_end_of_the_longest_context(
    tiny_llama_dir: Path, late_queue: LateQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(tiny_llama_dir, executor="torch")
    assert isinstance(model, Decoder)
    forward, seen = model.forward_device, list[tuple[int, int]]()

    def forward_device(step: DeviceStep, *rest: Any) -> torch.Tensor:
        seen.append((step.tokens.shape[0], int(step.batch.lengths.max())))
        return forward(step, *rest)

    monkeypatch.setattr(model, "forward_device", forward_device)
    config = EngineConfig(block_size=8, max_sequences=5, max_batch_tokens=64, max_model_len=256)
    layout = make_layout(model.spec, 8, model.dtype)
    measured_use(Gpu(late_queue, Meter(), None), config, model, layout)
    assert seen == [(64, 64), (64, 256), (5, 1)]


def test_tokens_of_captured_steps_with_chunks() -> None:
    assert graph_tokens(EngineConfig()) == (64, 128, 192, 256, 384, 512)
    assert graph_tokens(EngineConfig(max_batch_tokens=100)) == (64, 100)
    assert graph_tokens(EngineConfig(max_batch_tokens=1024))[-2:] == (896, 1024)
    assert graph_tokens(EngineConfig(max_batch_tokens=8192))[-2:] == (896, 1024)
    assert graph_tokens(EngineConfig(cuda_graph_tokens=(900, 7))) == (7, 512)
    assert graph_tokens(EngineConfig(cuda_graph_tokens=())) == ()
    with pytest.raises(InvalidConfig, match="cuda_graph_tokens"):
        EngineConfig.checked(cuda_graph_tokens=(0,))


class Meter:
    """A device of 64 MiB on which every run takes 8."""

    def __init__(self) -> None:
        self.runs = 0

    def total(self) -> int:
        return 64 * MIB

    def used(self) -> int:
        return 10 * MIB

    def peak(self, work: Callable[[], None]) -> int:
        work()
        self.runs += 1
        return 8 * MIB


class Ears:
    """Hears of tokens."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def step_started(self, plan: object) -> tuple[int, ...]:
        return ()

    def layers_done(self, plan: object, layers: int) -> None:
        raise AssertionError("nobody asked for layers")

    def step_ran(self, plan: object, seconds: float) -> None:
        pass

    def step_done(self, events: list[EngineEvent]) -> None:
        self.tokens += [event.token for event in events if isinstance(event, TokenSampled)]

    def step_failed(self, seq_ids: object, error: Exception) -> None:
        raise error


@pytest.fixture
def late_queue() -> Iterator[LateQueue]:
    queue = LateQueue()
    yield queue
    queue.close()


def worker_config(model_dir: Path, **engine: object) -> WorkerConfig:
    return WorkerConfig(
        instance_id="mixed-0",
        role=Role.MIXED,
        model_dir=model_dir,
        model_name="tiny",
        engine=EngineConfig(
            device="cpu", executor="torch", block_size=8, max_sequences=5, **engine
        ),
    )


async def generate(config: WorkerConfig, gpu: Gpu | None, say: Callable[[str], None]) -> list[int]:
    ears = Ears()
    instance = await Instance.load(config, ears, say, gpu=gpu)  # type: ignore[arg-type]
    try:
        instance.engine.submit(request(0, range(1, 30), 20, SAMPLINGS[1]))
        await instance.engine.idle()
        instance.check(idle=True)
    finally:
        await instance.close()
    return ears.tokens


async def test_an_instance_starts_measures_captures_and_generates(
    tiny_llama_dir: Path, late_queue: LateQueue
) -> None:
    meter, said = Meter(), list[str]()
    gpu = Gpu(late_queue, meter, None)
    config = worker_config(tiny_llama_dir, gpu_memory_utilization=0.5)
    tokens = await generate(config, gpu, said.append)
    assert meter.runs == 3
    assert late_queue.replays >= 19, "decodes were not replayed"
    assert tokens == await generate(worker_config(tiny_llama_dir, kv_memory_mib=8), None, print)
    captured = [line for line in said if line.startswith("captured")]
    assert captured[0] == "captured steps of up to 512 tokens with prompts (1 of 6)"
    assert captured[6] == "captured the step of 5 decodes (1 of 4)"
    assert len(captured) == 10
    (memory,) = (line for line in said if line.startswith("GPU memory"))
    # 32 less 10, 8 and 8, and 1 or 2 for options of sampling and rows between pieces
    assert "4 MiB for the KV pool; of 64 MiB" in memory


async def test_an_instance_that_does_not_fit_does_not_start(
    tiny_llama_dir: Path, late_queue: LateQueue
) -> None:
    config = worker_config(tiny_llama_dir, gpu_memory_utilization=0.1)
    with pytest.raises(InvalidConfig, match=r"gpu_memory_utilization.*the largest step 8"):
        await generate(config, Gpu(late_queue, Meter(), None), print)
