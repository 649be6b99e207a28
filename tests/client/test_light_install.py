"""The client and its commands need none of what only the server needs."""

import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import requires
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
IMPORTED_AS = {
    "grpcio-health-checking": "grpc_health",
    "grpcio-reflection": "grpc_reflection",
    "libucx-cu12": "libucx",
    "pyyaml": "yaml",
}
TYPERS_OWN = {"pydantic"}
"""What a light dependency brings along; our own code must not use it all the same."""

RUN = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"{name} is not installed", name=name)

BLOCKED = set(sys.argv.pop(1).split(","))
sys.meta_path.insert(0, Blocked())
from baton.cli.main import main
import baton.client
try:
    main()
finally:
    assert not BLOCKED & sys.modules.keys()
    assert sys.argv[1:] == ["serve"] or "baton.core.config" not in sys.modules
"""


def name_of(requirement: str) -> str:
    return re.match(r"[A-Za-z0-9_.-]+", requirement)[0].lower()


def blocked() -> set[str]:
    """Return the modules that `pip install baton-serve` alone does not bring."""
    names = {name_of(one) for extra in ("server", "dev") for one in extras(extra)}
    return {IMPORTED_AS.get(name, name.replace("-", "_")) for name in names} - TYPERS_OWN


def extras(name: str) -> list[str]:
    return PROJECT["optional-dependencies"][name]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", RUN, ",".join(sorted(blocked())), *arguments],
        capture_output=True, text=True, timeout=240, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def test_what_is_light_is_light():
    assert {name_of(one) for one in PROJECT["dependencies"]} == {
        "grpcio",
        "protobuf",
        "rich",
        "typer",
    }
    assert {"torch", "ray", "numpy", "fastapi"} <= {name_of(one) for one in extras("server")}
    assert "baton-serve[server]" in extras("dev")
    assert name_of("pydantic") in {name_of(one) for one in requires("typer") or ()}


def test_version_and_help_need_no_server():
    ended = run("version")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("baton ")
    assert "max-tokens" in run("chat", "--help").stdout


@pytest.mark.parametrize("command", [("chat",), ("generate", "hi")])
def test_clients_speak_to_whoever_is_there(command):
    ended = run(*command, "--address", "127.0.0.1:1")
    assert ended.returncode == 1
    assert "Error: UNAVAILABLE" in ended.stderr, ended.stderr


def test_what_needs_the_server_says_how_to_install_it():
    ended = run("serve")
    assert ended.returncode == 1
    assert "pip install 'baton-serve[server]'" in ended.stderr, ended.stderr
    assert "Traceback" not in ended.stderr
