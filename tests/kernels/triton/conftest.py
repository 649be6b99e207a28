"""The two processes that check the Triton kernels: one interprets them, one compiles them.

Both change Triton for good, so neither may be the process of other tests. They take minutes of one
core each, and begin with the first of all tests, in what the tests before theirs leave idle.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
NICENESS = 10
LIMIT_S = 1500
"""For what is left of them once their results are asked for; a busy machine takes long."""


class _Run:
    """One process, and the files that it writes to."""

    def __init__(self, *command: str | Path, **environment: str) -> None:
        inherited = {key: os.environ[key] for key in os.environ.keys() - {"TRITON_INTERPRET"}}
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._out: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115  (close does)
        self._err: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115  (close does)
        self._process = subprocess.Popen(
            ["nice", "-n", str(NICENESS), sys.executable, *command],
            cwd=ROOT,
            env=inherited | {"PYTHONPATH": os.pathsep.join(paths)} | environment,
            stdout=self._out,
            stderr=self._err,
        )

    def result(self) -> tuple[int, str, str]:
        status = self._process.wait(timeout=LIMIT_S)
        self._out.seek(0)
        self._err.seek(0)
        return status, self._out.read(), self._err.read()

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._out.close()
        self._err.close()


class Runs:
    """The two processes, under way, by name."""

    def __init__(self) -> None:
        models, executor = (
            ROOT / "tests" / name / "interpreted" for name in ("models", "executor")
        )
        options = "-q", "-p", "no:cacheprovider", HERE / "interpreted", models, executor
        self._runs = {
            "interpret": _Run("-m", "pytest", *options, TRITON_INTERPRET="1", OMP_NUM_THREADS="1"),
            "compile": _Run("-m", "tests.kernels.triton.compile"),
        }

    def result(self, name: str) -> tuple[int, str, str]:
        """Wait for a process; return its exit status and what it wrote to stdout and stderr."""
        return self._runs[name].result()

    def close(self) -> None:
        """End what still runs."""
        for run in self._runs.values():
            run.close()


_RUNS = pytest.StashKey[Runs]()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start them, if a test will ask for them."""
    wanted = any("runs" in getattr(item, "fixturenames", ()) for item in session.items)
    if wanted and not session.config.option.collectonly:
        session.config.stash[_RUNS] = Runs()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """End them, also if the tests are called off."""
    if (runs := session.config.stash.get(_RUNS, None)) is not None:
        runs.close()


@pytest.fixture(scope="session")
def runs(pytestconfig: pytest.Config) -> Runs:
    """The two processes, under way."""
    return pytestconfig.stash[_RUNS]
