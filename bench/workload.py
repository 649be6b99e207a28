"""What the load generator asks for: when, how long the prompt is, how long the answer."""

import csv
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

INPUT_COLUMNS = ("input_length", "ContextTokens")
OUTPUT_COLUMNS = ("output_length", "GeneratedTokens")
"""The names by which public traces call them."""


@dataclass(frozen=True, slots=True)
class Job:
    """One request."""

    index: int
    at: float
    """Seconds after the start at which it arrives; 0 in a closed loop."""
    input_length: int
    output_length: int

    def prompt(self, vocab: int, seed: int) -> list[int]:
        """Return token ids that no other job shares a beginning with (but by chance)."""
        rng = random.Random(f"{seed}/{self.index}")
        return [rng.randrange(1, vocab) for _ in range(self.input_length)]


@dataclass(frozen=True, slots=True)
class Lengths:
    """A log-normal distribution of whole numbers, cut off at both ends."""

    median: int
    sigma: float
    low: int
    high: int

    def draw(self, rng: random.Random) -> int:
        """Draw one."""
        return self.cut(round(rng.lognormvariate(math.log(self.median), self.sigma)))

    def cut(self, value: int) -> int:
        """Return `value`, or the end that it lies beyond."""
        return min(max(value, self.low), self.high)


def drawn(count: int, inputs: Lengths, outputs: Lengths, seed: int) -> list[tuple[int, int]]:
    """Draw `count` pairs of prompt and answer lengths."""
    rng = random.Random(seed)
    return [(inputs.draw(rng), outputs.draw(rng)) for _ in range(count)]


def replayed(path: Path, count: int, inputs: Lengths, outputs: Lengths) -> list[tuple[int, int]]:
    """Read `count` pairs from a CSV or JSONL trace, cut off at the ends of the distributions."""
    pairs: list[tuple[int, int]] = []
    with path.open(newline="", encoding="utf-8") as file:
        rows: Iterator[dict[str, object]]
        rows = map(json.loads, file) if path.suffix == ".jsonl" else iter(csv.DictReader(file))
        for row in rows:
            if len(pairs) == count:
                break
            asked_in, asked_out = (_column(row, c, path) for c in (INPUT_COLUMNS, OUTPUT_COLUMNS))
            pairs.append((inputs.cut(asked_in), outputs.cut(asked_out)))
    if len(pairs) < count:
        raise SystemExit(f"{path} has {len(pairs)} rows, fewer than {count}")
    return pairs


def jobs(pairs: list[tuple[int, int]], rate: float | None, seed: int) -> list[Job]:
    """Give each pair its time of arrival: Poisson at `rate` per second, or at once if None."""
    rng = random.Random(f"arrivals {seed}")
    at = 0.0
    result = []
    for index, (input_length, output_length) in enumerate(pairs):
        if rate is not None and index:
            at += rng.expovariate(rate)
        result.append(Job(index, at, input_length, output_length))
    return result


def _column(row: dict[str, object], names: tuple[str, ...], path: Path) -> int:
    for name in names:
        if row.get(name) is not None:
            return int(str(row[name]))
    raise SystemExit(f"{path} has none of the columns {', '.join(names)}")
