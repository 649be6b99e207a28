"""An engine over Triton's kernels, from seats to sampled tokens, against the torch executor."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from baton.core.request import GenerateRequest, SamplingParams
from baton.executor import gpu_option_tensors, gpu_options
from baton.executor.gpu_pass import GpuLimits, GpuPass
from baton.executor.gpu_queue import EagerQueue
from baton.executor.gpu_runner import GpuRunner
from baton.executor.kv_cache import KVCache
from baton.executor.runner import ModelRunner
from baton.kernels.backend import Backend, using_backend
from baton.kernels.triton import decode_plan
from baton.models.decoder import Decoder
from baton.models.loader import load_model
from tests.executor.engine_world import EngineWorld
from tests.executor.engine_world import request as numbered
from tests.executor.option_cases import OPTIONS, assert_same_logprobs, requests_of
from tests.models.device_cases import SIZES

LIMITS = GpuLimits(rows=3, tokens=16, blocks=16, depth=2)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a small GPU, whose programs the interpreter runs one by one."""
    monkeypatch.setattr(decode_plan, "_PROGRAMS", 8)
    monkeypatch.setattr(decode_plan, "_LEAST_TILES", 1)
    for module in (gpu_options, gpu_option_tensors):
        monkeypatch.setattr(module, "CHANGES", 12)


@pytest.fixture
def model(tmp_path: Path, write_model: Callable[..., Path]) -> Iterator[Decoder]:
    folder = write_model(tmp_path, "qwen3", **(SIZES | {"head_dim": 32}))
    with using_backend(Backend.TORCH):
        loaded = load_model(folder, executor="torch")
        assert isinstance(loaded, Decoder)
        yield loaded


@pytest.fixture(params=["plain", "options"])
def requests(request: pytest.FixtureRequest) -> list[GenerateRequest]:
    if request.param == "options":
        return requests_of([OPTIONS[name] for name in ("all", "frequency", "bad words")], output=3)
    samplings = (SamplingParams(temperature=0.0), SamplingParams(temperature=0.9, seed=3, top_k=9))
    return [
        numbered(i, range(2 + i, 2 + i + length), 4, samplings[i % 2])
        for i, length in enumerate((3, 20, 9))
    ]


async def test_tokens_are_those_of_the_torch_executor(
    model: Decoder, requests: list[GenerateRequest]
) -> None:
    sizes = {"block_size": 8, "max_batch_tokens": LIMITS.tokens, "max_sequences": LIMITS.rows}
    plain = EngineWorld(
        model, lambda kv: ModelRunner(model, kv), num_blocks=16, depth=1, ahead=False, **sizes
    )
    with using_backend(Backend.TORCH):
        expected = await plain.serve(requests)
    queue = EagerQueue()

    def make(kv: KVCache) -> GpuRunner:
        kv.tensor.fill_(float("nan"))  # what no token fills may be anything
        steps = GpuPass(model, kv, queue, LIMITS)
        steps.capture((3,), lambda size: None)
        return GpuRunner(steps, queue, kv, None, depth=2)

    with using_backend(Backend.TRITON):
        world = EngineWorld(model, make, num_blocks=16, depth=2, ahead=True, **sizes)
        try:
            assert await world.serve(requests) == expected
            assert_same_logprobs(world, plain)
        finally:
            world.runner.close()
