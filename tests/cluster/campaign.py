"""Plays seeds one after another on a cluster of three nodes, which lives until a seed fails."""

import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path

from .faults import draw_schedule
from .play import Play, Report
from .three_nodes import ThreeNodes, catalogue


class Campaign:
    """`async with Campaign(model_dir) as campaign:` — each seed is asked both questions.

    What comes after a failure would be judged for what is left of it, so that the next seed has a
    cluster of its own.
    """

    def __init__(self, model_dir: Path) -> None:
        self.logs = ""
        """Of the nodes, from the last seed that failed."""
        self._model_dir = model_dir
        self._prompts = catalogue()
        self._right: list[list[int]] = []
        self._cluster: ThreeNodes | None = None
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> "Campaign":
        return self

    async def __aexit__(self, *_: object) -> None:
        self._cluster = None
        await self._stack.aclose()

    async def run(self, seed: int) -> Report:
        """Play the schedule of a seed."""
        report = Report()
        try:
            cluster = await self._started()
            schedule = draw_schedule(seed, len(self._prompts))
            began = time.monotonic()
            play = Play(schedule, cluster, self._prompts, self._right)
            report = play.report
            await play.run()
            report.seconds = time.monotonic() - began
        except Exception as error:
            # Of a group, the errors in it say what happened.
            report.problems += [f"{type(e).__name__}: {e}" for e in _leaves(error)]
        if report.problems and self._cluster is not None:
            self.logs, self._cluster = self._cluster.logs(), None
            await self._stack.aclose()
        return report

    async def _started(self) -> ThreeNodes:
        """Return the cluster, and start one if there is none."""
        if self._cluster is None:
            folder = self._stack.enter_context(
                tempfile.TemporaryDirectory(prefix="bc-", dir="/tmp")
            )
            cluster = ThreeNodes(Path(folder), self._model_dir)
            self._cluster = await self._stack.enter_async_context(cluster)
            right = await cluster.answers(self._prompts)
            assert self._right in ([], right), "two clusters without faults have other tokens"
            self._right = right
        return self._cluster


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for one in error.exceptions for leaf in _leaves(one)]
    return [error]
