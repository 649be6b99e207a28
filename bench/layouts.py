"""How fast one instance decodes and prefills in every layout, and where its time goes, in Markdown.

    python bench/layouts.py

Each rank is a process with one thread. Beyond as many ranks as there are cores nothing can be a
speed-up: what is measured is that layouts work, what their collectives cost, and how much of the
time a stage waits for the others.
"""

import argparse
import asyncio
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import MixtralConfig, MixtralForCausalLM

from baton.cli.defaults import DEMO_MODEL
from baton.core.config import (
    EngineConfig,
    HandoverConfig,
    LeaderRef,
    ParallelConfig,
    WorkerConfig,
)
from baton.core.ids import RequestId
from baton.core.request import GenerateRequest, SamplingParams
from baton.core.topology import Role
from baton.engine.step import EngineEvent, StepPlan, TokenSampled
from baton.executor.follower import Follower
from baton.executor.instance import Instance
from baton.models.spec import read_spec

DENSE = {
    "tp1": {},
    "tp2": {"tp": 2},
    "pp2": {"pp": 2},
    "dp2": {"dp": 2},
    "tp2pp2": {"tp": 2, "pp": 2},
}
EXPERTS = {
    "tp1": {},
    "tp2": {"tp": 2},
    "ep2": {"ep": 2},
    "tp2ep2": {"tp": 2, "ep": 2},
    "dp2ep2": {"dp": 2, "ep": 2},
}
LONG = {"tp1": {}, "tp2": {"tp": 2}, "cp2": {"cp": 2}}
DEADLINE_S = 300.0


@dataclass(frozen=True)
class Load:
    """Requests that begin at once."""

    name: str
    requests: int
    prompt: int = 32
    output: int = 96


DECODES = (Load("batch 1", 1), Load("batch 8", 8))
PROMPTS = (Load("a prompt of 1,920 in one step", 1, 1920, 1),)


@dataclass(frozen=True)
class Round:
    """One load, until all its requests have ended."""

    tokens_per_s: float
    """Of the output, or of the prompt if there is hardly any output."""
    collectives: float
    """Share of the leader's time inside collectives, waiting for peers included."""
    idle: float
    """Share of the time in which the leader's stage computed nothing."""


class Listener:
    """Counts tokens; see baton.executor.engine_loop.Listener."""

    def __init__(self) -> None:
        self.begin(0)

    def begin(self, requests: int) -> None:
        """Expect so many requests."""
        self.left = requests
        self.tokens = 0
        self.ended = asyncio.Event()

    def step_started(self, plan: StepPlan) -> Sequence[int]:
        """Nobody waits for single layers."""
        return ()

    def layers_done(self, plan: StepPlan, layers: int) -> None:
        """Never called."""

    def step_ran(self, plan: StepPlan, seconds: float) -> None:
        """Nothing to note."""

    def step_done(self, events: Sequence[EngineEvent]) -> None:
        """Count the tokens."""
        for event in events:
            if isinstance(event, TokenSampled):
                self.tokens += 1
                self.left -= event.finish is not None
        if not self.left:
            self.ended.set()

    def step_failed(self, seq_ids: Sequence[object], error: Exception) -> None:
        """Give up: no figure is right any more."""
        raise error


async def measure(
    folder: Path, sizes: dict[str, int], rounds: int, loads: Sequence[Load]
) -> dict[str, list[Round]]:
    """Return the rounds of each load on an instance of its own."""
    most = max(load.prompt for load in loads)
    config = WorkerConfig(
        instance_id="bench-0",
        role=Role.MIXED,
        model_dir=folder,
        model_name="bench",
        engine=EngineConfig(
            executor="torch",
            kv_memory_mib=64,
            prefix_cache=False,
            max_batch_tokens=max(512, most),
        ),
        handover=HandoverConfig().with_secret(),
        parallel=ParallelConfig(**sizes, expert_balance_steps=0),
    )
    others: list[subprocess.Popen[bytes]] = []

    def start_others(leader: LeaderRef) -> None:
        for rank in range(1, config.parallel.size):
            wanted = config.model_copy(update={"rank": rank, "leader": leader})
            command = [sys.executable, __file__, "--follow", wanted.model_dump_json()]
            others.append(subprocess.Popen(command))

    listener = Listener()
    try:
        instance = await Instance.load(
            config, listener, lambda line: None, on_listening=start_others
        )
        vocabulary = read_spec(folder).vocab_size
        found: dict[str, list[Round]] = {load.name: [] for load in loads}
        for number in range(rounds + 1):  # the first one warms up
            for load in loads:
                result = await _round(instance, listener, load, vocabulary)
                if number:
                    found[load.name].append(result)
        await instance.close()
        for other in others:
            assert other.wait(30) == 0, "a rank did not close in order"
    finally:
        for other in others:
            other.kill()
    return found


async def _round(instance: Instance, listener: Listener, load: Load, vocabulary: int) -> Round:
    listener.begin(load.requests)
    for number in range(load.requests):
        tokens = tuple((7 + 31 * number + 3 * i) % vocabulary for i in range(load.prompt))
        sampling = SamplingParams(temperature=0.0, min_tokens=load.output)
        request = GenerateRequest(RequestId(f"r{number}"), tokens, load.output, sampling)
        instance.engine.submit(request)
    before, began = _seconds(instance), time.perf_counter()
    async with asyncio.timeout(DEADLINE_S):
        await listener.ended.wait()
    wall = time.perf_counter() - began
    inside, computing = (now - then for now, then in zip(_seconds(instance), before, strict=True))
    tokens = listener.tokens if load.output > 1 else load.requests * load.prompt
    return Round(tokens / wall, inside / wall, 1 - computing / wall)


def _seconds(instance: Instance) -> tuple[float, float]:
    """Return seconds inside collectives, and inside steps less those, of the leader so far."""
    stats = instance.stats()
    names = [n for n in stats if n.startswith(("tp_", "pp_", "ep_", "cp_")) and n.endswith("_s")]
    inside = sum(float(stats[name]) for name in names)
    return inside, float(stats["rank_busy_s"]) - inside


def table(title: str, found: dict[str, dict[str, list[Round]]]) -> str:
    """Return a Markdown table: medians, and least to most for the speed."""
    loads = list(next(iter(found.values())))
    heads = [f"{load}: tokens/s | collectives | stage idle" for load in loads]
    lines = [f"| {title} | " + " | ".join(heads) + " |", "|---|" + "---|" * 3 * len(loads)]
    for layout, by_load in found.items():
        cells = [layout]
        for rounds in by_load.values():
            speeds = [r.tokens_per_s for r in rounds]
            spread = f"({min(speeds):.0f} to {max(speeds):.0f})"
            cells.append(f"{statistics.median(speeds):.0f} {spread}")
            cells.append(f"{statistics.median(r.collectives for r in rounds):.0%}")
            cells.append(f"{statistics.median(r.idle for r in rounds):.0%}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def model_with_experts(folder: Path) -> Path:
    """Write a random model with eight experts, of the demo model's size."""
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_local_experts=8,
        num_experts_per_tok=2,
        vocab_size=4096,
        max_position_embeddings=2048,
    )
    MixtralForCausalLM(config).save_pretrained(folder)
    return folder


async def follow(text: str) -> None:
    """Be another rank of an instance."""
    follower = await Follower.start(
        WorkerConfig.model_validate_json(text), on_progress=lambda line: None
    )
    await follower.wait_closed()


async def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--follow", metavar="CONFIG", help="be another rank; for this command")
    options = parser.parse_args()
    if options.follow:
        await follow(options.follow)
        return
    with tempfile.TemporaryDirectory() as folder:
        experts = model_with_experts(Path(folder))
        works = [
            ("demo model", DEMO_MODEL, DENSE, DECODES),
            ("eight experts", experts, EXPERTS, DECODES),
            ("demo model", DEMO_MODEL, LONG, PROMPTS),
        ]
        for title, model, layouts, loads in works:
            found = {
                name: await measure(model, sizes, options.rounds, loads)
                for name, sizes in layouts.items()
            }
            print(table(title, found), end="\n\n")


if __name__ == "__main__":
    asyncio.run(main())
