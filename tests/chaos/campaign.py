"""Runs seeds one after another, and keeps the processes while the world stays the same."""

import traceback
from pathlib import Path
from typing import Any

from .cluster import Cluster, right_answers
from .play import Play, Report
from .schedule import Schedule, draw_schedule


class Campaign:
    """Any number of runs; `close` ends the processes and checks that each closes in good order."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        """Where the processes write their logs."""
        self._right: list[list[int]] = []
        self._cluster: Cluster | None = None
        self._play: Play | None = None
        self._played: list[int] = []
        """Seeds that the processes have lived through."""

    async def run(self, seed: int) -> tuple[Schedule, Report]:
        """Play the schedule of a seed."""
        schedule = draw_schedule(seed)
        report = Report()
        try:
            if not self._right:
                self._right = await right_answers(self.folder)
            cluster = await self._cluster_of(schedule)
            self._played.append(seed)
            self._play = Play(schedule, cluster, self._right)
            report = self._play.report
            await self._play.run()
        except Exception:
            report.problems.append(traceback.format_exc())
        if report.problems and self._cluster is not None:
            await self._cluster.kill()
            self._cluster, self._played = None, []
        return schedule, report

    async def close(self) -> None:
        """Close the processes of the last world; AssertionError names the seeds they lived through.

        What a process holds is seen after every schedule, so that little is left to find here.
        """
        cluster, self._cluster = self._cluster, None
        played, self._played = self._played, []
        if cluster is not None:
            try:
                await cluster.close()
            except AssertionError as error:
                raise AssertionError(f"closing the world of seeds {played}: {error}") from error

    async def _cluster_of(self, schedule: Schedule) -> Cluster:
        if self._cluster is None or self._cluster.world != schedule.world:
            await self.close()
            folder = self.folder / f"seed-{schedule.seed}"
            folder.mkdir(exist_ok=True)
            self._cluster = await Cluster.start(schedule.world, folder, self._told)
        return self._cluster

    def _told(self, message: dict[str, Any]) -> None:
        if self._play is not None:
            self._play.told(message)
