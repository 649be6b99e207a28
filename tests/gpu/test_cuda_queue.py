"""CUDA's queue and graphs, and a whole engine over them; skipped where there is no CUDA."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from baton.core.config import EngineConfig
from baton.executor.cuda_queue import CudaQueue
from baton.executor.gpu_memory import CudaMeter
from baton.executor.gpu_start import Gpu, room_on_gpu, start_runner
from baton.executor.kv_cache import KVCache, make_layout
from baton.executor.runner import ModelRunner
from baton.kernels.backend import Backend, using_backend
from baton.models.decoder import Decoder
from baton.models.loader import load_model

from ..executor.engine_world import EngineWorld  # noqa: TID252
from ..executor.test_run_ahead import mixed_requests  # noqa: TID252

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_work_runs_in_order_and_marks_are_passed() -> None:
    queue = CudaQueue()
    there = torch.zeros(1 << 20, dtype=torch.int64, device=queue.device)
    here = queue.host_buffer(1 << 20)
    busy = torch.randn(2048, 2048, device=queue.device)
    for _ in range(20):
        queue.launch(lambda: _discard(torch.mm(busy, busy)))
    queue.launch(lambda: _discard(there.fill_(7)))
    queue.launch(lambda: _discard(here.copy_(there, non_blocking=True)))
    queue.record().wait()
    assert (here == 7).all()


def test_graphs_share_memory_and_are_replayed_on_new_inputs() -> None:
    queue = CudaQueue()
    inputs, found = (torch.zeros(8, device=queue.device) for _ in range(2))

    def work(count: int) -> None:
        found[:count] = (inputs[:count] + 1).square()

    replays = {count: queue.capture(lambda count=count: work(count)) for count in (8, 2)}
    here = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
    queue.launch(lambda: _discard(inputs.copy_(here)))
    replays[8]()
    queue.launch(lambda: _discard(inputs.zero_()))
    replays[2]()
    queue.record().wait()
    assert found.tolist() == [1.0, 1.0, 16.0, 25.0, 36.0, 49.0, 64.0, 81.0]


async def test_an_engine_on_a_gpu_gives_the_tokens_of_the_cpu(
    tmp_path: Path, write_llama: Callable[..., Path]
) -> None:
    folder = write_llama(tmp_path / "llama")
    sizes = {"block_size": 16, "max_batch_tokens": 64, "max_sequences": 6}
    with using_backend(Backend.TORCH):
        cpu = load_model(folder, executor="torch")
        requests = mixed_requests(cpu)
        plain = EngineWorld(
            cpu, lambda kv: ModelRunner(cpu, kv), num_blocks=64, depth=1, ahead=False, **sizes
        )
        expected = await plain.serve(requests)
    model = load_model(folder, executor="torch", device="cuda")
    assert isinstance(model, Decoder)
    queue, config = CudaQueue(), EngineConfig(**sizes)
    gpu = Gpu(queue, CudaMeter(queue.device), None)
    layout = make_layout(model.spec, config.block_size, model.dtype)
    room = room_on_gpu(gpu, config, model, layout, 0, print)
    assert room.blocks > 64
    kv = KVCache(layout, 64, "cuda")
    runner = start_runner(gpu, config, model, kv, None, 2, room, print, 60.0)
    world = EngineWorld(model, lambda _: runner, num_blocks=64, depth=2, ahead=True, **sizes)
    try:
        assert await world.serve(requests) == expected
    finally:
        runner.close()


def _discard(_: torch.Tensor) -> None:
    """Return nothing, as launched work does."""
