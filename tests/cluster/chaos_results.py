"""What a campaign on three nodes came to: kept in a file line by line, and shown as a table."""

import json
import math
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .play import Report


@dataclass
class Result:
    """Of one seed."""

    seed: int
    report: Report
    load: float = field(default_factory=lambda: os.getloadavg()[0])
    """Processes that wanted a core, over the last minute."""

    @property
    def passed(self) -> bool:
        """Whether both oracles are content."""
        return not self.report.problems

    @property
    def fault(self) -> str:
        """What has struck, if that was one fault alone; the controller may have been there too."""
        struck = self.report.struck
        where = ", controller there" * ("the_controllers_node" in struck)
        alone = [kind for kind in struck if kind != "the_controllers_node"]
        return alone[0] + where if len(alone) == 1 else ""

    def line(self) -> str:
        """Return it for the file."""
        return json.dumps(asdict(self)) + "\n"


def read(path: Path) -> list[Result]:
    """Return the results in a file, none if there is no file."""
    lines = path.read_text().splitlines() if path.exists() else []
    found = map(json.loads, lines)
    return [Result(one["seed"], Report(**one["report"]), one["load"]) for one in found]


def table(results: Sequence[Result]) -> str:
    """Return what each kind of fault cost where it struck alone, as Markdown."""
    by_kind: dict[str, list[Report]] = defaultdict(list)
    for result in results:
        if result.passed and result.fault:
            by_kind[result.fault].append(result.report)
    lines = [
        "| fault | runs | gap p50, p99 | noticed p50, p99 | whole p50, p99 |",
        "|---|---|---|---|---|",
    ]
    for kind, reports in sorted(by_kind.items()):
        columns = (
            [r.gap_s for r in reports],
            [r.noticed_s for r in reports if r.noticed_s is not None],
            [r.whole_s for r in reports if r.whole_s is not None],
        )
        cells = " | ".join(map(_quantiles, columns))
        lines.append(f"| {kind.replace('_', ' ')} | {len(reports)} | {cells} |")
    return "\n".join(lines)


def summary(results: Sequence[Result]) -> str:
    """Return how many passed, how often each kind struck, how long one took, and the load."""
    struck: dict[str, int] = defaultdict(int)
    for result in results:
        for kind in result.report.struck:
            struck[kind] += 1
    passed = sum(result.passed for result in results)
    loads = [result.load for result in results] or [0.0]
    times = _quantiles([result.report.seconds for result in results if result.passed])
    return "\n".join(
        [
            "struck: " + ", ".join(f"{kind} {n}" for kind, n in sorted(struck.items())),
            f"seconds a schedule, p50 and p99: {times}; load {min(loads):.0f} to {max(loads):.0f}",
            f"{passed} of {len(results)} passed",
        ]
    )


def _quantiles(values: Sequence[float]) -> str:
    if not values:
        return "-"
    ordered = sorted(values)
    return ", ".join(f"{ordered[math.ceil(s * len(values)) - 1]:.1f}" for s in (0.5, 0.99))
