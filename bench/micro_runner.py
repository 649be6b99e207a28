"""Time of one engine step: decodes at several batch sizes, and a chunk of a prompt.

    python bench/micro_runner.py --threads 1 --repeat 50

Every decode step follows a prompt of --context tokens, and is greedy unless --sampled.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from baton.core.ids import BlockId, SeqId
from baton.core.request import SamplingParams
from baton.engine.step import ScheduledSequence, StepPlan
from baton.executor.kv_cache import KVCache, make_layout
from baton.executor.runner import ModelRunner
from baton.models.loader import load_model

DEMO_MODEL = Path(__file__).parents[1] / "demo_model" / "main"
SAMPLED = SamplingParams(temperature=0.8, top_k=50, top_p=0.95, seed=1)


def main() -> None:
    """Measure and print the table."""
    options = _arguments()
    model = load_model(options.model, threads=options.threads)
    layout = make_layout(model.spec, options.block_size, "float32")
    sampling = SAMPLED if options.sampled else SamplingParams(temperature=0.0)
    table = Table("step", "tokens", "best ms", "median ms", "p90 ms", "tokens/s at median")
    for batch in options.batch:
        per_sequence = layout.blocks_for(options.context + 1)
        runner = ModelRunner(model, KVCache(layout, batch * per_sequence))
        parts = [
            _part(i, options.context, 1, i * per_sequence, per_sequence, sampling)
            for i in range(batch)
        ]
        _row(table, f"decode, batch {batch}", runner, StepPlan(0, tuple(parts)), options.repeat)
    blocks = layout.blocks_for(options.prompt)
    runner = ModelRunner(model, KVCache(layout, blocks))
    whole = StepPlan(0, (_part(0, 0, options.prompt, 0, blocks, sampling),))
    _row(table, "prompt", runner, whole, max(3, options.repeat // 5))
    Console().print(table)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, default=DEMO_MODEL)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--context", type=int, default=256, help="tokens before each decode")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt's chunk")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=50)
    parser.add_argument("--sampled", action="store_true", help="top-k 50, top-p 0.95")
    return parser.parse_args()


def _part(
    number: int, start: int, count: int, first_block: int, blocks: int, sampling: SamplingParams
) -> ScheduledSequence:
    table = tuple(BlockId(first_block + i) for i in range(blocks))
    tokens = tuple((7 * i + number) % 512 for i in range(count))
    return ScheduledSequence(SeqId(number), tokens, start, table, True, sampling)


def _row(table: Table, name: str, runner: ModelRunner, plan: StepPlan, repeat: int) -> None:
    times = _measure(lambda: runner.execute(plan), repeat)
    median = statistics.median(times)
    spread = [min(times), median, times[int(len(times) * 0.9)]]
    shown = [f"{seconds * 1000:.2f}" for seconds in spread]
    table.add_row(name, str(plan.num_tokens), *shown, f"{plan.num_tokens / median:,.0f}")


def _measure(action: Callable[[], object], repeat: int) -> list[float]:
    for _ in range(3):
        action()
    times = []
    for _ in range(repeat):
        began = time.perf_counter()
        action()
        times.append(time.perf_counter() - began)
    return sorted(times)


if __name__ == "__main__":
    main()
