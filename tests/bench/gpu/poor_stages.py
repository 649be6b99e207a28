"""Stages that go wrong in every way a stage can, for tests of the campaign."""

import os
import signal
import threading
from typing import Any

from bench.gpu.stage_run import StageRun


def run(stage: StageRun) -> None:
    """Do what the environment asks for."""
    stage.case("first", lambda: {"value": 1})
    stage.case("second", HOW[os.environ["POOR_STAGE"]])
    stage.case("third", lambda: {"value": 3})


def _raise() -> dict[str, Any]:
    raise ValueError("a plain mistake\nwith a second line")


def _import() -> dict[str, Any]:
    import nowhere_to_be_found  # type: ignore[import-not-found]

    return dict(nowhere_to_be_found)


def _die() -> dict[str, Any]:
    os.kill(os.getpid(), signal.SIGSEGV)
    return {}


def _hang() -> dict[str, Any]:
    threading.Event().wait()
    return {}


HOW = {"raise": _raise, "import": _import, "die": _die, "hang": _hang, "well": dict}
