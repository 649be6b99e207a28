"""The `baton` command in a process of its own, and a look at what it leaves behind."""

import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

MARK = "BATON_TEST_MARK"
LINE_TIMEOUT_S = 90


class Baton:
    """One running command; its output line by line."""

    def __init__(self, temp_dir: Path, *arguments: str) -> None:
        self.mark = secrets.token_hex(8)
        self.temp_dir = temp_dir
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-m", "baton.cli.main", *arguments],
            env={**os.environ, MARK: self.mark, "TMPDIR": str(temp_dir)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait_for(self, text: str) -> str:
        """Read lines up to one that contains `text`, and return it."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            if text in line:
                return line.rstrip()
        raise AssertionError(f"no {text!r} in:\n" + "\n".join(self.lines))

    def end(self, number: signal.Signals | None = None) -> int:
        """Send a signal, if one is given, read what is left, and return the exit status."""
        if number is not None:
            self.process.send_signal(number)
        rest, _ = self.process.communicate(timeout=LINE_TIMEOUT_S)
        self.lines += rest.splitlines()
        return self.process.returncode

    def processes(self) -> set[int]:
        """Return all processes that come from this command: they inherit its environment."""
        found = set()
        for entry in Path("/proc").iterdir():
            try:
                environment = (entry / "environ").read_bytes()
            except (OSError, ValueError):
                continue
            if f"{MARK}={self.mark}".encode() in environment:
                found.add(int(entry.name))
        return found

    def assert_nothing_left(self) -> None:
        """Assert that no process and no file is left."""
        assert self.processes() == set()
        assert os.listdir(self.temp_dir) == []


@pytest.fixture
def baton() -> Iterator[Callable[..., Baton]]:
    """Return a function that starts `baton ARGUMENT…`; what is left in the end is killed."""
    started: list[Baton] = []
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="b-") as folder:

        def start(*arguments: str) -> Baton:
            command = Baton(Path(folder), *arguments)
            started.append(command)
            return command

        yield start
        for command in started:
            for pid in command.processes():
                os.kill(pid, signal.SIGKILL)
            command.process.communicate()
