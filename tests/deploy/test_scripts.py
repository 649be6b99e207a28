"""The chart's two shell scripts, run by a real shell on real processes."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from tests.deploy.chart import CHART

CONTROLLER = CHART / "scripts" / "controller.sh"
DRAIN = CHART / "scripts" / "drain.sh"
TIMEOUT_S = 120


class Controller:
    """The controller's script, whose command says the first line of the spec, and may fail."""

    def __init__(self, folder: Path) -> None:
        self.spec, self.session, self.broken = (folder / n for n in ("spec", "session", "broken"))
        self.spec.write_text("one\n")
        self.session.symlink_to("session-1")
        command = f'[ ! -e "{self.broken}" ]; failed=$?; head -n1 "{self.spec}"; exit $failed'
        self.process = subprocess.Popen(
            ["sh", CONTROLLER, self.spec, "0.05", "sh", "-c", command],
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "BATON_APPLIED_FILE": str(folder / "applied"),
                "BATON_RAY_SESSION": str(self.session),
            },
        )
        assert self.process.stdout is not None
        self.said: IO[str] = self.process.stdout

    def restart_ray(self, session: str) -> None:
        draft = self.session.with_suffix(".new")
        draft.symlink_to(session)
        draft.replace(self.session)


@pytest.fixture
def controller(tmp_path: Path) -> Iterator[Controller]:
    found = Controller(tmp_path)
    yield found
    found.process.terminate()
    assert found.process.wait(TIMEOUT_S) == 0
    found.said.close()


def test_a_spec_is_applied_once_and_again_when_it_or_ray_is_another(
    controller: Controller, tmp_path: Path
) -> None:
    assert controller.said.readline() == "one\n"
    draft = tmp_path / "draft"
    draft.write_text("two\n")
    draft.replace(controller.spec)
    # Had it been applied twice, there would be another "one" before it.
    assert controller.said.readline() == "two\n"
    controller.restart_ray("session-2")
    assert controller.said.readline() == "two\n"


def test_what_failed_is_tried_again(controller: Controller, tmp_path: Path) -> None:
    assert controller.said.readline() == "one\n"
    controller.broken.touch()
    draft = tmp_path / "draft"
    draft.write_text("two\n")
    draft.replace(controller.spec)
    assert [controller.said.readline() for _ in range(3)] == ["two\n"] * 3


def _process(title: str) -> subprocess.Popen[bytes]:
    """Start a process of some title, and wait until it has it."""
    command = ["bash", "-c", 'exec -a "$0" sh -c "echo; read -r line" ', title]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    return process


def test_batons_processes_in_a_pod_are_asked_to_drain_and_no_others(tmp_path: Path) -> None:
    titles = ("ray::InstanceActor.wait", "ray::GatewayActor", "ray::Other", "raylet")
    processes = [_process(title) for title in titles]
    for process in processes:
        (tmp_path / str(process.pid)).symlink_to(f"/proc/{process.pid}")
    environment = {**os.environ, "BATON_PROC": str(tmp_path)}
    script = subprocess.Popen(["sh", DRAIN, "0", str(TIMEOUT_S)], env=environment)
    # They are gone from /proc once they are waited for.
    assert [p.wait(TIMEOUT_S) for p in processes[:2]] == [-signal.SIGTERM] * 2
    assert script.wait(TIMEOUT_S) == 0
    assert [p.poll() for p in processes[2:]] == [None, None]
    for process in processes:
        process.communicate()


def test_draining_ends_with_its_time(tmp_path: Path) -> None:
    stubborn = _process("ray::InstanceActor")
    (tmp_path / str(stubborn.pid)).symlink_to(f"/proc/{stubborn.pid}")
    environment = {**os.environ, "BATON_PROC": str(tmp_path)}
    done = subprocess.run(["sh", DRAIN, "0", "0"], env=environment, timeout=TIMEOUT_S)
    assert done.returncode == 0
    assert stubborn.poll() is None
    stubborn.communicate()
