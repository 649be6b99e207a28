"""What is released has all of Baton, and serves from a fresh environment outside the repo."""

import os
import re
import signal
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
HATCH = PROJECT["tool"]["hatch"]["build"]
MINUTES = 60
INSTALL_S = 20 * MINUTES


def test_an_sdist_has_each_folder_once_and_in_baton() -> None:
    links = {f"/{path.name}" for path in (ROOT / "baton").iterdir() if path.is_symlink()}
    assert set(HATCH["targets"]["sdist"]["exclude"]) == links
    assert HATCH["skip-excluded-dirs"] is True


def test_the_version_is_in_one_place() -> None:
    version = PROJECT["project"]["version"]
    said = f"## {version}"
    assert said in (ROOT / "CHANGELOG.md").read_text()
    source = (ROOT / "baton" / "__init__.py").read_text()
    assert version not in source


class Fresh:
    """A virtual environment without anything."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        run([sys.executable, "-m", "venv", str(folder)])

    def install(self, *what: str) -> None:
        """Install with the versions of constraints.txt."""
        pip = [str(self.folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
        run([*pip, "--constraint", str(ROOT / "constraints.txt"), *what])

    def run(self, *command: str) -> str:
        """Run a command of the environment outside the repo; return what it prints."""
        return run([str(self.folder / "bin" / command[0]), *command[1:]], cwd=self.folder)


def run(command: list[str], cwd: Path | None = None) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=INSTALL_S
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def dist() -> Path:
    """Build sdist and wheel into dist/; return the wheel, which is also that of the sdist."""
    out = ROOT / "dist"
    build = ROOT / "build" / "release"
    for folder in (out, build / "sdist"):
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob("baton_serve-*"):
            path.unlink()
    tools = Fresh(build / "tools")
    tools.install(*PROJECT["build-system"]["requires"])
    run([str(tools.folder / "bin" / "hatchling"), "build", "-d", str(out)], cwd=ROOT)
    [sdist], [wheel] = out.glob("*.tar.gz"), out.glob("*.whl")
    pip = [str(tools.folder / "bin" / "pip"), "wheel", "--quiet", "--no-deps"]
    run([*pip, "--no-build-isolation", "-w", str(build / "sdist"), str(sdist)])
    [again] = (build / "sdist").glob("*.whl")
    assert contents(wheel) == contents(again)
    return wheel


def contents(wheel: Path) -> dict[str, int]:
    """Return the checksum of every file."""
    with zipfile.ZipFile(wheel) as opened:
        return {info.filename: info.CRC for info in opened.infolist()}


@pytest.mark.slow
@pytest.mark.timeout(3 * INSTALL_S)
def test_the_wheel_serves_from_a_fresh_environment(dist: Path, tmp_path: Path) -> None:
    light, full = Fresh(tmp_path / "light"), Fresh(tmp_path / "full")
    light.install(str(dist))
    full.install(f"{dist}[server]")
    version = PROJECT["project"]["version"]
    assert light.run("baton", "version") == full.run("baton", "version") == f"baton {version}\n"

    command = [str(full.folder / "bin" / "baton"), "serve", "--port", "0", "--grpc-port", "0"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    server = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        address = ""
        for line in server.stdout:
            if "gRPC API" in line:
                address = line.split()[-1]
            if "Ctrl-C stops everything" in line:
                break
        said = light.run("baton", "generate", "--address", address, "--max-tokens", "8", "def f(")
        assert said.strip()
    finally:
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=INSTALL_S)
    assert server.returncode == 0


@pytest.mark.slow
@pytest.mark.timeout(3 * INSTALL_S)
@pytest.mark.parametrize("extra", sorted(PROJECT["project"]["optional-dependencies"]))
def test_every_extra_can_be_installed(dist: Path, tmp_path: Path, extra: str) -> None:
    """With pip's own resolver, from the index; without unpacking gigabytes of CUDA."""
    fresh = Fresh(tmp_path / "fresh")
    fresh.install("--dry-run", "--report", str(tmp_path / "report.json"), f"{dist}[{extra}]")
    own = re.escape(PROJECT["project"]["name"])
    assert re.search(rf'"name": ?"{own}"', (tmp_path / "report.json").read_text())
