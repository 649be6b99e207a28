"""`python -m tests.cluster.chaos [SEED | FIRST-LAST] [--out FILE]`: faults on three nodes.

One seed alone is told with all that happened. A seed that fails is told, and the next goes on in
another cluster. With --out, results are kept in a file: run again, it goes on after the last one,
and the tables are of all that the file has.
"""

import argparse
import asyncio
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from .campaign import Campaign
from .chaos_results import Result, read, summary, table
from .nodes import why_not

_HOPELESS = 3
"""So many failures in a row end the campaign."""
_MODEL = Path(__file__).parents[2] / "demo_model" / "main"


async def main(seeds: Sequence[int], out: Path | None) -> int:
    """Play the seeds; return the exit status. SIGTERM ends the nodes too."""
    this = asyncio.current_task()
    assert this is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, this.cancel)
    results = [] if out is None else [r for r in read(out) if r.seed in seeds]
    known = {result.seed for result in results}
    async with Campaign(_MODEL) as campaign:
        for seed in seeds:
            if seed in known:
                continue
            result = Result(seed, await campaign.run(seed))
            results.append(result)
            _show(result, campaign.logs, whole=len(seeds) == 1)
            if out is not None:
                with out.open("a") as file:
                    file.write(result.line())
            last = results[-_HOPELESS:]
            if len(last) == _HOPELESS and not any(one.passed for one in last):
                _print(f"{_HOPELESS} in a row have failed: what is wrong is no matter of a seed")
                break
    _print("", table(results), "", summary(results))
    if failed := [result.seed for result in results if not result.passed]:
        _print(f"failed: {failed}; replay one: make chaos-nodes NODE_SEEDS={failed[0]}")
    return 1 if failed else 0


def _show(result: Result, logs: str, *, whole: bool) -> None:
    report = result.report
    if whole or report.problems:
        _print(*report.log)
    if report.problems:
        _print(logs)
    verdict = "FAILED" if report.problems else "ok"
    figures = f"gap {report.gap_s:5.2f} s, moved {report.moved}"
    if report.noticed_s is not None:
        figures += f", noticed {report.noticed_s:5.2f} s"
    if report.whole_s is not None:
        figures += f", whole {report.whole_s:5.2f} s"
    struck = " ".join(report.struck) or "none struck"
    line = f"seed {result.seed:4d} {verdict:6} {report.seconds:5.1f} s  {struck:28} {figures}"
    _print(line, *report.problems)


def _print(*lines: str) -> None:
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


def _seeds(text: str) -> range:
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1)


if __name__ == "__main__":
    if reason := why_not():
        _print(f"left out, no nodes can be made here: {reason}")
        sys.exit(0)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("seeds", nargs="?", type=_seeds, default="0-47", help="SEED or FIRST-LAST")
    parser.add_argument("--out", type=Path, help="where results are kept, and looked for")
    arguments = parser.parse_args()
    sys.exit(asyncio.run(main(arguments.seeds, arguments.out)))
