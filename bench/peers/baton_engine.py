"""Baton: a mixed instance in this process, as `baton serve` would load it, without its network.

It computes with whatever executor it chooses. For float32 the checkpoint is one of float32 weights;
`best` is the bfloat16 checkpoint, computed in bfloat16 with sums in float32 and KV in bfloat16.
"""

import asyncio
import importlib.metadata
import json
import shutil
from collections.abc import Sequence
from typing import Literal

import torch
from protocol import Job, Run, Waves, serve
from safetensors.torch import load_file, save_file

from baton.core.config import EngineConfig, WorkerConfig
from baton.core.ids import RequestId, SeqId
from baton.core.request import GenerateRequest, SamplingParams
from baton.core.topology import Role
from baton.engine.step import EngineEvent, StepPlan, TokenSampled
from baton.executor.instance import Instance

GREEDY = SamplingParams(temperature=0.0)
KV_MEMORY_MIB = 2048
BATCH_TOKENS = 2048
"""A whole prompt in one step, as vLLM takes it; in steps of 512, which is Baton's default, a prompt
of 2,048 takes a tenth longer."""
DEADLINE_S = 600.0


class InProcess:
    """Engine loop, scheduler and executor, driven from one event loop."""

    def __init__(self, job: Job) -> None:
        self._loop = asyncio.new_event_loop()
        self._listener = _Listener()
        loading = Instance.load(_config(job), self._listener, lambda _: None)
        self._instance = self._loop.run_until_complete(loading)
        executor = str(self._instance.stats()["executor"])
        self.weight_bytes = 4.0 if job.exact else 2.0
        version = importlib.metadata.version("baton-serve")
        self.label = f"Baton {version} ({executor}), {_dtype(job)} weights, arithmetic and KV"

    def generate(self, prompts: Sequence[Sequence[int]], outputs: Sequence[int]) -> Run:
        """Submit the requests and run the loop until all have ended."""
        return self._loop.run_until_complete(self._generate(prompts, outputs))

    async def _generate(self, prompts: Sequence[Sequence[int]], outputs: Sequence[int]) -> Run:
        listener = self._listener
        listener.begin(outputs)
        for number, (prompt, wanted) in enumerate(zip(prompts, outputs, strict=True)):
            request = GenerateRequest(RequestId(f"r{number}"), tuple(prompt), wanted, GREEDY)
            listener.numbers[self._instance.engine.submit(request)] = number
        async with asyncio.timeout(DEADLINE_S):
            await listener.finished.wait()
        return listener.waves.run


class _Listener:
    """Notes every token; raises what the model raised."""

    def __init__(self) -> None:
        self.begin([])

    def begin(self, outputs: Sequence[int]) -> None:
        """Forget what was; the clock starts here."""
        self.numbers: dict[SeqId, int] = {}
        self.finished = asyncio.Event()
        self.waves = Waves(outputs)

    def step_ran(self, plan: StepPlan, seconds: float) -> None:
        """See Listener."""

    def step_started(self, plan: StepPlan) -> Sequence[int]:
        """Nothing is measured here, and nobody waits for single layers."""
        return ()

    def layers_done(self, plan: StepPlan, layers: int) -> None:
        """Never called: see `step_started`."""

    def step_done(self, events: Sequence[EngineEvent]) -> None:
        """Note the step's tokens."""
        for event in events:
            if isinstance(event, TokenSampled):
                self.waves.add(self.numbers[event.seq_id], event.token)
                if event.finish is not None and self.waves.finished:
                    self.finished.set()

    def step_failed(self, seq_ids: Sequence[SeqId], error: Exception) -> None:
        """Give up: no figure is right any more."""
        raise error


def _dtype(job: Job) -> Literal["float32", "bfloat16"]:
    return "float32" if job.exact else "bfloat16"


def _config(job: Job) -> WorkerConfig:
    engine = EngineConfig(
        dtype=_dtype(job),
        kv_memory_mib=KV_MEMORY_MIB,
        max_batch_tokens=BATCH_TOKENS,
        max_sequences=job.most_sequences,
        prefix_cache=False,
    )
    return WorkerConfig(
        instance_id="bench-0",
        role=Role.MIXED,
        model_dir=job.converted if job.exact else job.checkpoint,
        model_name=job.checkpoint.name,
        threads=job.threads,
        engine=engine,
    )


def convert(job: Job) -> None:
    """Widen the weights to float32 for jobs that ask for that."""
    if not job.exact:
        return
    unfinished = job.converted.with_name(job.converted.name + ".unfinished")
    shutil.copytree(job.checkpoint, unfinished, dirs_exist_ok=True)
    file = unfinished / "model.safetensors"
    tensors = {name: tensor.to(torch.float32) for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((unfinished / "config.json").read_text())
    (unfinished / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    unfinished.rename(job.converted)


if __name__ == "__main__":
    serve(InProcess, convert)
