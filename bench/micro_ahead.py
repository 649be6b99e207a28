"""What the host costs a step, with and without running ahead: `python -m bench.micro_ahead`.

A device is played by a thread that sleeps for as long as a step would take there. All sequences
decode through the real engine loop and scheduler. `exposed` is by how much the time from step to
step is longer than the device's own: what the host costs. Both ways take turns, round by round.
`launch` is what the executor for GPUs does for a step before the device has it (executor/gpu_*.py),
without the device's own calls.
"""

import argparse
import asyncio
import statistics
import time
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from baton.core.config import EngineConfig
from baton.core.ids import RequestId
from baton.core.request import GenerateRequest, SamplingParams
from baton.engine.scheduler import Scheduler
from baton.engine.step import EngineEvent, LayerWatch, StepPlan, StepResult, TokenSampled
from baton.executor.engine_loop import EngineLoop, Runner
from baton.executor.gpu_pass import GpuLimits, GpuPass
from baton.executor.gpu_queue import Mark, Work
from baton.executor.gpu_runner import GpuRunner
from baton.executor.kv_cache import KVCache, make_layout
from baton.models.decoder import Decoder
from baton.models.loader import load_model

DEMO_MODEL = Path(__file__).parents[1] / "demo_model" / "main"
PROMPT = 64
_PARAMS = SamplingParams(temperature=0.8, top_p=0.95)


class SleepingDevice:
    """A runner whose device computes steps one after the other, each for `seconds`."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._device = ThreadPoolExecutor(max_workers=1)

    def execute(self, plan: StepPlan, watch: LayerWatch | None = None) -> Future[StepResult]:
        """See Runner."""
        return self._device.submit(self._compute, plan)

    def _compute(self, plan: StepPlan) -> StepResult:
        time.sleep(self._seconds)
        return StepResult(plan.step, {s.seq_id: 1 for s in plan.sequences})


class IdleQueue:
    """A GpuQueue that does nothing of what is launched."""

    device = torch.device("cpu")

    def host_buffer(self, size: int) -> Tensor:
        """See GpuQueue: as a result, every token is 1, and sound."""
        return torch.ones(size, dtype=torch.int64)

    def launch(self, work: Work) -> None:
        """See GpuQueue."""

    def capture(self, work: Work) -> Work:
        """See GpuQueue."""
        return lambda: None

    def record(self) -> Mark:
        """See GpuQueue."""
        return self

    def wait(self) -> None:
        """See Mark."""


class Listener:
    """Counts steps, and tells when all sequences have ended."""

    def __init__(self, sequences: int) -> None:
        self.ends: list[float] = []
        self.done = asyncio.Event()
        self._open = sequences

    def step_started(self, plan: StepPlan) -> tuple[int, ...]:
        """See Listener in executor/engine_loop.py."""
        return ()

    def layers_done(self, plan: StepPlan, layers: int) -> None:
        """See there."""

    def step_ran(self, plan: StepPlan, seconds: float) -> None:
        """See there."""
        self.ends.append(time.perf_counter())

    def step_done(self, events: list[EngineEvent]) -> None:
        """See there."""
        self._open -= sum(isinstance(e, TokenSampled) and e.finish is not None for e in events)
        if not self._open:
            self.done.set()

    def step_failed(self, seq_ids: object, error: Exception) -> None:
        """See there."""
        raise error


def config_for(sequences: int) -> EngineConfig:
    """Return limits under which all sequences decode in each step."""
    return EngineConfig(
        max_batch_tokens=max(512, PROMPT * sequences),
        max_sequences=sequences,
        max_waiting=sequences,
        prefix_cache=False,
    )


async def seconds_per_step(runner: Runner, sequences: int, steps: int, *, ahead: bool) -> float:
    """Return the median time from one step's end to the next's, while all sequences decode."""
    config, depth = config_for(sequences), 2 if ahead else 1
    blocks = sequences * ((PROMPT + steps) // config.block_size + 2)
    scheduler = Scheduler(config, blocks, depth=depth, ahead=ahead)
    listener = Listener(sequences)
    loop = EngineLoop(scheduler, runner, listener, depth=depth)  # type: ignore[arg-type]
    running = asyncio.create_task(loop.run())
    for index in range(sequences):
        prompt = tuple(range(PROMPT))
        loop.submit(GenerateRequest(RequestId(f"r{index}"), prompt, steps, _PARAMS))
    async with asyncio.timeout(60):
        await listener.done.wait()
    await loop.close()
    await running
    ends = listener.ends[2:]
    return statistics.median(b - a for a, b in pairwise(ends))


def launch_seconds(model: Decoder, sequences: int, steps: int) -> float:
    """Return what the executor for GPUs does on the host for a step of decodes."""
    queue, config = IdleQueue(), config_for(sequences)
    kv = KVCache(make_layout(model.spec, config.block_size, model.dtype), 1)
    limits = GpuLimits(sequences, config.max_batch_tokens, 512, depth=2)
    passes = GpuPass(model, kv, queue, limits)
    passes.capture((sequences,), lambda size: None)
    runner = GpuRunner(passes, queue, kv, None, depth=2)
    spent: list[float] = []

    class Timed:
        def execute(self, plan: StepPlan, watch: LayerWatch | None = None) -> Future[StepResult]:
            began = time.perf_counter()
            future = runner.execute(plan, watch)
            spent.append(time.perf_counter() - began)
            return future

    asyncio.run(seconds_per_step(Timed(), sequences, steps, ahead=True))
    runner.close()
    return statistics.median(spent[2:])


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 32, 128, 256])
    parser.add_argument("--device-ms", type=float, nargs="+", default=[3.0, 8.0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    model = load_model(DEMO_MODEL, executor="torch")
    assert isinstance(model, Decoder)
    table = Table("sequences", "device ms", "exposed µs", "ahead: exposed µs", "launch µs")
    for sequences in options.sequences:
        launch = launch_seconds(model, sequences, options.steps)
        for device_ms in options.device_ms:
            times: dict[bool, list[float]] = {False: [], True: []}
            own = [_slept(device_ms / 1000) for _ in range(50)]
            for _ in range(options.rounds):
                for ahead, taken in times.items():
                    device = SleepingDevice(device_ms / 1000)
                    step = seconds_per_step(device, sequences, options.steps, ahead=ahead)
                    taken.append(asyncio.run(step))
            shown = [
                f"{(statistics.median(times[ahead]) - statistics.median(own)) * 1e6:,.0f}"
                for ahead in (False, True)
            ]
            table.add_row(str(sequences), f"{device_ms:g}", *shown, f"{launch * 1e6:,.0f}")
    Console().print(table)


def _slept(seconds: float) -> float:
    """Return how long a sleep of so many seconds really takes here."""
    began = time.perf_counter()
    time.sleep(seconds)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
