"""Time of one engine step, native and torch side by side: decodes, and a chunk of a prompt.

    python bench/micro_runner.py --threads 1 --repeat 50

Every decode step follows a prompt of --context tokens, and is greedy unless --sampled. Executors
take turns, step by step, so that whatever else the machine does disturbs both alike. `read` is
what a native step reads of weights and KV per second of its best time: beside it, in the title,
is what one thread reads that does nothing else.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from baton.core.ids import BlockId, SeqId
from baton.core.request import SamplingParams
from baton.engine.step import ScheduledSequence, StepPlan
from baton.executor.kv_cache import KVCache, make_layout
from baton.executor.runner import ModelRunner
from baton.models.loader import Model, load_model
from baton.models.native import NativeDecoder

DEMO_MODEL = Path(__file__).parents[1] / "demo_model" / "main"
SAMPLED = SamplingParams(temperature=0.8, top_k=50, top_p=0.95, seed=1)


def main() -> None:
    """Measure and print the table."""
    options = _arguments()
    models = {name: _load(name, options) for name in options.executor}
    sampling = SAMPLED if options.sampled else SamplingParams(temperature=0.0)
    some = next(iter(models.values()))
    layout = make_layout(some.spec, options.block_size, "float32")
    table = Table(
        *("step", "executor", "best ms", "median ms", "p90 ms", "tokens/s", "read GB/s"),
        title=f"one thread reads {_read_bandwidth() / 1e9:.1f} GB/s from memory",
    )
    for batch in options.batch:
        per_sequence = layout.blocks_for(options.context + 1)
        parts = [
            _part(i, options.context, 1, i * per_sequence, per_sequence, sampling)
            for i in range(batch)
        ]
        plan, blocks = StepPlan(0, tuple(parts)), batch * per_sequence
        kv = batch * (options.context + 1) * layout.block_bytes // layout.block_size
        _rows(table, f"decode, batch {batch}", models, (plan, blocks, kv), options)
    blocks = layout.blocks_for(options.prompt)
    whole = StepPlan(0, (_part(0, 0, options.prompt, 0, blocks, sampling),))
    _rows(table, f"prompt of {options.prompt}", models, (whole, blocks, 0), options)
    Console().print(table)


def _load(name: str, options: argparse.Namespace) -> Model:
    began = time.perf_counter()
    model = load_model(options.model, threads=options.threads, executor=name)
    seconds = time.perf_counter() - began
    size = sum(path.stat().st_size for path in options.model.glob("*.safetensors"))
    print(f"{model.executor}: loaded in {seconds:.2f} s, {size / seconds / 1e9:.2f} GB/s")
    return model


def _read_bandwidth() -> float:
    """Return the bytes per second at which one thread reads memory that no cache has."""
    memory = np.ones(1 << 27, dtype=np.int64)
    return memory.nbytes / min(_time(memory.max) for _ in range(5))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, default=DEMO_MODEL)
    parser.add_argument("--executor", nargs="+", default=["native", "torch"])
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


def _rows(
    table: Table,
    name: str,
    models: Mapping[str, Model],
    work: tuple[StepPlan, int, int],
    options: argparse.Namespace,
) -> None:
    """Add a row per executor; `work` is a plan, its blocks, and the KV bytes that it reads."""
    plan, blocks, kv = work
    runners = {}
    for executor, model in models.items():
        layout = make_layout(model.spec, options.block_size, "float32")
        runners[executor] = ModelRunner(model, KVCache(layout, blocks))
        for _ in range(2):
            runners[executor].execute(plan)
    times: dict[str, list[float]] = {executor: [] for executor in runners}
    for _ in range(options.repeat if plan.num_tokens < 100 else max(3, options.repeat // 5)):
        for executor, runner in runners.items():
            times[executor].append(_time(lambda runner=runner: runner.execute(plan)))
    for executor, model in models.items():
        taken = sorted(times[executor])
        spread = [taken[0], statistics.median(taken), taken[int(len(taken) * 0.9)]]
        read = ""
        if isinstance(model, NativeDecoder):
            read = f"{(model.weights.nbytes + kv) / taken[0] / 1e9:.1f}"
        shown = [f"{seconds * 1000:.2f}" for seconds in spread]
        table.add_row(name, executor, *shown, f"{plan.num_tokens / spread[1]:,.0f}", read)


def _time(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
