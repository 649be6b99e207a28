"""`python -m tests.cluster.chaos [SEED | FIRST-LAST]`: schedules of faults on three nodes.

All are played on one cluster, one after the other; one seed alone is told with all that happened.
"""

import asyncio
import math
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from .faults import draw_schedule
from .nodes import why_not
from .play import Play, Report
from .three_nodes import ThreeNodes, catalogue

_MODEL = Path(__file__).parents[2] / "demo_model" / "main"


async def main(first: int, last: int) -> int:
    """Play the seeds; return the exit status."""
    folder = Path(tempfile.mkdtemp(prefix="bc-", dir="/tmp"))
    prompts = catalogue()
    reports: list[Report] = []
    failed: list[int] = []
    async with ThreeNodes(folder, _MODEL) as cluster:
        right = await cluster.answers(prompts)
        for seed in range(first, last + 1):
            started = time.monotonic()
            play = Play(draw_schedule(seed, len(prompts)), cluster, prompts, right)
            try:
                report = await play.run()
            except Exception as error:
                report = play.report
                report.problems.append(f"{type(error).__name__}: {error}")
            reports.append(report)
            _show(seed, report, time.monotonic() - started, whole=first == last)
            if report.problems:
                failed.append(seed)
                _print(cluster.logs())
                break  # what comes next would be judged for what is left of this
    _summary(reports)
    if failed:
        _print(f"failed: {failed}; replay one: make chaos-nodes NODE_SEEDS={failed[0]}")
        return 1
    shutil.rmtree(folder, ignore_errors=True)
    _print(f"{len(reports)} of {last - first + 1} passed")
    return 0


def _show(seed: int, report: Report, seconds: float, *, whole: bool) -> None:
    if whole or report.problems:
        _print(*report.log)
    result = "FAILED" if report.problems else "ok"
    figures = f"gap {report.gap_s:5.2f} s, moved {report.moved}"
    if report.noticed_s is not None:
        figures += f", noticed {report.noticed_s:5.2f} s"
    if report.whole_s is not None:
        figures += f", whole {report.whole_s:5.2f} s"
    struck = " ".join(report.struck) or "none struck"
    _print(f"seed {seed:4d} {result:6} {seconds:5.1f} s  {struck:28} {figures}", *report.problems)


def _summary(reports: Sequence[Report]) -> None:
    """Print a table of what each kind of fault cost, of the schedules with that one alone."""
    by_kind: dict[str, list[Report]] = defaultdict(list)
    for report in reports:
        if len(report.struck) == 1 and not report.problems:
            by_kind[report.struck[0]].append(report)
    _print("", "| fault | runs | gap p50 | gap p99 | noticed p50 | p99 | whole p50 | p99 |")
    _print("|---|---|---|---|---|---|---|---|")
    for kind, found in sorted(by_kind.items()):
        columns = (
            [r.gap_s for r in found],
            [r.noticed_s for r in found if r.noticed_s is not None],
            [r.whole_s for r in found if r.whole_s is not None],
        )
        cells = [_quantile(column, share) for column in columns for share in (0.5, 0.99)]
        _print(f"| {kind} | {len(found)} | {' | '.join(cells)} |")


def _quantile(values: Sequence[float], share: float) -> str:
    if not values:
        return "-"
    return f"{sorted(values)[math.ceil(share * len(values)) - 1]:.1f}"


def _print(*lines: str) -> None:
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


def _seeds(text: str) -> tuple[int, int]:
    first, _, last = text.partition("-")
    return int(first), int(last or first)


if __name__ == "__main__":
    if reason := why_not():
        _print(f"left out, no nodes can be made here: {reason}")
        sys.exit(0)
    sys.exit(asyncio.run(main(*_seeds(sys.argv[1] if len(sys.argv) > 1 else "0-99"))))
