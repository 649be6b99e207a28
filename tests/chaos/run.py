"""`python -m tests.chaos.run [SEED | FIRST-LAST]`: the campaign behind `make chaos`.

One seed alone is replayed with its schedule and all that happened.
"""

import asyncio
import logging
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from baton.core import log

from .campaign import Campaign
from .play import Report
from .schedule import KINDS, Schedule

_ENOUGH_FOR_ALL = 300
"""With so many seeds, every kind of fault must have struck."""


async def main(first: int, last: int) -> int:
    """Run the seeds; return the exit status."""
    folder = Path(tempfile.mkdtemp(prefix="baton-chaos-"))
    campaign = Campaign(folder)
    struck: Counter[str] = Counter()
    outcomes: Counter[str] = Counter()
    migrations: Counter[str] = Counter()
    backed_up, failed = 0, []
    try:
        for seed in range(first, last + 1):
            started = time.monotonic()
            schedule, report = await campaign.run(seed)
            struck += report.struck
            outcomes += report.outcomes
            migrations += report.migrations
            backed_up += report.backed_up
            failed += [seed] * bool(report.problems)
            _show(schedule, report, time.monotonic() - started, whole=first == last)
        failed += await _close(campaign, last)
    finally:
        await campaign.close()
    _print("", "requests moved to another decode instance:")
    _print(*(f"  {name:18}{n:6}" for name, n in sorted(migrations.items())))
    _print(f"blocks backed up to another decode instance: {backed_up}")
    status = _summary(last - first + 1, struck, outcomes, failed)
    if status:
        _print(f"logs of the processes: {folder}")
    else:
        shutil.rmtree(folder)
    return status


async def _close(campaign: Campaign, last: int) -> list[int]:
    """Close the last world; return its last seed if that shows that something is wrong."""
    try:
        await campaign.close()
    except AssertionError as error:
        _print(f"FAILED: {error}")
        return [last]
    return []


def _show(schedule: Schedule, report: Report, seconds: float, *, whole: bool) -> None:
    if whole or report.problems:
        _print(str(schedule), *report.log)
    result = "FAILED" if report.problems else "ok"
    faults = " ".join(f"{kind}:{count}" for kind, count in report.struck.items()) or "none struck"
    _print(f"seed {schedule.seed:4d} {result:6} {seconds:5.2f} s  {faults}", *report.problems)


def _summary(runs: int, struck: Counter[str], outcomes: Counter[str], failed: list[int]) -> int:
    _print("", "faults that struck:")
    _print(*(f"  {kind:14}{struck[kind]:6}" for kind in KINDS))
    _print("handovers ended:", *(f"  {name:18}{n:6}" for name, n in sorted(outcomes.items())))
    missed = [kind for kind in KINDS if not struck[kind]] if runs >= _ENOUGH_FOR_ALL else []
    if missed:
        _print(f"never struck: {', '.join(missed)}")
    if failed:
        _print(f"{len(failed)} of {runs} failed; replay one: make chaos SEEDS={failed[0]}")
    else:
        _print(f"{runs} of {runs} passed")
    return 1 if missed or failed else 0


def _print(*lines: str) -> None:
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


def _seeds(text: str) -> tuple[int, int]:
    first, _, last = text.partition("-")
    return int(first), int(last or first)


if __name__ == "__main__":
    log.configure(level=logging.ERROR)  # what the gateways warn of, the schedule has brought about
    sys.exit(asyncio.run(main(*_seeds(sys.argv[1] if len(sys.argv) > 1 else "0-499"))))
