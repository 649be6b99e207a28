"""Time of choosing a step's tokens: what plain rows cost, and what each option adds.

    python bench/micro_sampler.py --rows 32 --vocabulary 4096

Every row has said --context tokens; the histories are kept from step to step, as in a runner.
"""

import argparse
import random
import statistics
import time
from dataclasses import replace

import torch
from rich.console import Console
from rich.table import Table

from baton.core.ids import SeqId
from baton.core.request import SamplingParams
from baton.engine.step import SamplingContext
from baton.executor.batch import SampledRow
from baton.executor.sampler import Sampler

GREEDY = SamplingParams(temperature=0.0)
CASES = {
    "greedy": GREEDY,
    "temperature": SamplingParams(0.8),
    "top-k 50, top-p 0.95": SamplingParams(0.8, 50, 0.95),
    "greedy, penalties": replace(GREEDY, repetition_penalty=1.1, presence_penalty=0.5),
    "greedy, 20 biases": replace(GREEDY, logit_bias=tuple((i, 1.0) for i in range(20))),
    "greedy, 20 bad words": replace(GREEDY, bad_words=tuple((i, i) for i in range(20))),
    "greedy, 5 top logprobs": replace(GREEDY, logprobs=5),
    "temperature, min-p": SamplingParams(0.8, min_p=0.05),
    "temperature, typical-p": SamplingParams(0.8, typical_p=0.9),
}


def main() -> None:
    """Measure and print the table."""
    options = _arguments()
    torch.set_num_threads(options.threads)
    table = Table("sampling", "best µs", "median µs")
    for name, params in CASES.items():
        with torch.inference_mode():
            times = _measure(params, options)
        table.add_row(name, f"{times[0] * 1e6:.0f}", f"{statistics.median(times) * 1e6:.0f}")
    Console().print(f"{options.rows} rows, vocabulary {options.vocabulary}", table)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=300)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def _measure(params: SamplingParams, options: argparse.Namespace) -> list[float]:
    """Return the seconds of each step, in ascending order."""
    draw = random.Random(0)
    noise = torch.Generator().manual_seed(0)
    logits = torch.randn(options.rows, options.vocabulary, generator=noise) * 3
    sampler = Sampler()
    before = tuple(draw.randrange(options.vocabulary) for _ in range(options.context - 1))
    times = []
    for step in range(options.repeat + 20):
        context = SamplingContext(options.context // 2, (), None if step else before)
        rows = [
            SampledRow(
                SeqId(i),
                options.context + step,
                params,
                (draw.randrange(options.vocabulary),),
                None if params.plain else context,
            )
            for i in range(options.rows)
        ]
        fresh = logits.clone()
        began = time.perf_counter()
        sampler.step(fresh, rows)
        times.append(time.perf_counter() - began)
    return sorted(times[20:])


if __name__ == "__main__":
    main()
