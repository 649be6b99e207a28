"""How long the scheduler takes per step: `python -m bench.micro_scheduler` or run the file.

All sequences decode, with contexts that cross a block boundary every `block_size` steps, which is
the steady state of a busy decode instance. The model is left out: tokens are made up. Then single
prompts are planned in a full prefix cache: found there, and not.
"""

import argparse
import statistics
import time
from typing import NamedTuple

from baton.core.config import EngineConfig
from baton.core.ids import RequestId
from baton.core.request import GenerateRequest
from baton.engine.scheduler import Scheduler
from baton.engine.step import StepPlan, StepResult


def filled(sequences: int, prompt: int, max_tokens: int) -> Scheduler:
    """Return a scheduler in which `sequences` prompts were handed over and admitted."""
    config = EngineConfig(
        max_batch_tokens=max(512, 2 * sequences),
        max_sequences=sequences,
        max_waiting=sequences,
    )
    tokens = prompt + max_tokens + config.block_size
    scheduler = Scheduler(config, sequences * (tokens // config.block_size + 1))
    for index in range(sequences):
        ids = tuple(range(prompt - index % config.block_size))
        scheduler.reserve(GenerateRequest(RequestId(f"r{index}"), ids, max_tokens))
    for reserved in scheduler.grant():
        scheduler.admit(reserved.seq_id, 1)
    return scheduler


def measure(sequences: int, prompt: int, steps: int) -> tuple[list[float], list[float]]:
    """Return the seconds of each plan() and of each apply()."""
    scheduler = filled(sequences, prompt, steps + 2)
    plans, applies = [], []
    for _ in range(steps):
        start = time.perf_counter()
        plan = scheduler.plan()
        planned = time.perf_counter()
        assert isinstance(plan, StepPlan)
        assert len(plan.sequences) == sequences
        result = StepResult(plan.step, {s.seq_id: 1 for s in plan.sequences})
        made = time.perf_counter()
        scheduler.apply(result)
        plans.append(planned - start)
        applies.append(time.perf_counter() - made)
    scheduler.check()
    return plans, applies


class CacheTimes(NamedTuple):
    """Seconds to plan one prompt, and to apply its step; the model is left out."""

    prompt: int
    hit: int
    plan: float
    apply: float


def measure_cache(cached_blocks: int, prompt: int, rounds: int) -> list[CacheTimes]:
    """Return what one prompt costs that is not cached, and one that is, in a cache that is full.

    The first evicts as many blocks as it needs; its hashes are computed in both.
    """
    config = EngineConfig(max_batch_tokens=1 << 17, max_sequences=8)
    scheduler = Scheduler(config, cached_blocks)
    fill = iter(range(1 << 40))
    while scheduler.stats().roster.memory.pool.free > prompt // config.block_size + 1:
        run_prompt(scheduler, next(fill), prompt)
    rows = []
    for _ in range(rounds):
        number = next(fill)
        rows.append(run_prompt(scheduler, number, prompt))
        rows.append(run_prompt(scheduler, number, prompt))
    scheduler.check()
    return rows


def run_prompt(scheduler: Scheduler, number: int, prompt: int) -> CacheTimes:
    """Run one prompt of its own for one token."""
    ids = (number, *range(prompt - 1))
    before = scheduler.stats().roster.memory.cached_tokens
    scheduler.submit(GenerateRequest(RequestId(f"p{number}"), ids, 1))
    start = time.perf_counter()
    plan = scheduler.plan()
    planned = time.perf_counter()
    assert plan is not None
    scheduler.apply(StepResult(plan.step, {s.seq_id: 1 for s in plan.sequences}))
    applied = time.perf_counter()
    hit = scheduler.stats().roster.memory.cached_tokens - before
    return CacheTimes(prompt, hit, planned - start, applied - planned)


def main() -> None:
    """Print microseconds per step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 16, 64, 256, 1024])
    parser.add_argument("--prompt", type=int, default=2048, help="tokens")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--cached-blocks", type=int, default=100_000)
    arguments = parser.parse_args()
    print(f"{'sequences':>9} {'plan µs':>9} {'p99':>9} {'apply µs':>9} {'p99':>9} {'per seq':>9}")
    for sequences in arguments.sequences:
        times = measure(sequences, arguments.prompt, arguments.steps)
        row = [f(values) * 1e6 for values in times for f in (statistics.median, _p99)]
        per_sequence = (row[0] + row[2]) / sequences
        print(f"{sequences:>9} " + " ".join(f"{v:>9.1f}" for v in [*row, per_sequence]))
    print(f"\none prompt, in a cache of {arguments.cached_blocks} blocks")
    print(f"{'prompt':>9} {'hit':>9} {'plan µs':>9} {'apply µs':>9}")
    for prompt in (512, 2048, 8192, 32768):
        rows = measure_cache(arguments.cached_blocks, prompt, rounds=10)
        for found in (rows[0::2], rows[1::2]):
            plan = statistics.median(row.plan for row in found) * 1e6
            apply = statistics.median(row.apply for row in found) * 1e6
            print(f"{prompt:>9} {found[0].hit:>9} {plan:>9.1f} {apply:>9.1f}")


def _p99(values: list[float]) -> float:
    return sorted(values)[int(0.99 * (len(values) - 1))]


if __name__ == "__main__":
    main()
