"""The two processes that check the Triton kernels: one interprets them, one compiles them.

Both change Triton for good, so neither may be the process of other tests. They are started
together, since each uses one core.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]


class Runs:
    """Processes by name; their output is kept until it is asked for."""

    def __init__(self) -> None:
        self._processes: dict[str, subprocess.Popen[str]] = {}
        self._ended: dict[str, tuple[int, str, str]] = {}

    def start(self, name: str, *command: str | Path, **environment: str) -> None:
        """Start Python with the repo's root on its path."""
        inherited = {key: os.environ[key] for key in os.environ.keys() - {"TRITON_INTERPRET"}}
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._processes[name] = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=inherited | {"PYTHONPATH": os.pathsep.join(paths)} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def result(self, name: str) -> tuple[int, str, str]:
        """Wait for a process; return its exit status and what it wrote to stdout and stderr."""
        if name not in self._ended:
            process = self._processes[name]
            out, err = process.communicate(timeout=800)
            self._ended[name] = process.returncode, out, err
        return self._ended[name]

    def close(self) -> None:
        """End what still runs."""
        for process in self._processes.values():
            if process.poll() is None:
                process.kill()
                process.communicate()


@pytest.fixture(scope="session")
def runs() -> Iterator[Runs]:
    """The two processes, under way."""
    runs = Runs()
    try:
        models, executor = (
            ROOT / "tests" / name / "interpreted" for name in ("models", "executor")
        )
        folders = HERE / "interpreted", models, executor
        options = ("-q", "-p", "no:cacheprovider", *folders)
        runs.start("interpret", "-m", "pytest", *options, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
        runs.start("compile", "-m", "tests.kernels.triton.compile")
        yield runs
    finally:
        runs.close()
