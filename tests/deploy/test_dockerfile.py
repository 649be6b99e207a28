"""The image's recipe keeps its promises; image_root.py runs it for real, which takes minutes."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from typer.main import get_command

from baton.cli.main import app

from .dockerfile import Stage, ignored, listed, parse

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "docker"
DOCKERFILE = FOLDER / "Dockerfile"
IMAGES = ("cpu", "cuda")


@pytest.fixture(scope="module")
def stages() -> dict[str, Stage]:
    return {stage.name: stage for stage in parse(DOCKERFILE.read_text())}


def pins(path: Path) -> dict[str, str]:
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    found = {}
    for line in lines:
        name, version = re.fullmatch(r"([\w.-]+)==([\w.]+)", line).groups()  # type: ignore[union-attr]
        found[re.sub(r"[-_.]+", "-", name).lower()] = version
    assert len(found) == len(lines), "a name is there twice"
    return found


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_runs_as_nobody_special_and_under_an_init(
    stages: dict[str, Stage], image: str
) -> None:
    stage = stages[image]
    assert stage.values("USER") == ["10001:10001"]
    names = [name for name, _ in stage.steps]
    assert "RUN" not in names[names.index("USER") :]
    assert listed(stage.values("ENTRYPOINT")[0]) == ["tini", "--"]
    assert stage.values("EXPOSE") == ["8000 8001"]
    health = stage.values("HEALTHCHECK")[0]
    assert listed(health.partition("CMD ")[2]) == ["baton-healthcheck"]
    assert stage.inherited_environment(stages)["PATH"].startswith("/opt/baton/bin:")


@pytest.mark.parametrize("image", IMAGES)
def test_what_an_image_runs_is_a_command_of_baton(stages: dict[str, Stage], image: str) -> None:
    first, command, *arguments = listed(stages[image].values("CMD")[0])
    assert first == "baton"
    context = get_command(app).commands[command].make_context(command, arguments)  # type: ignore[attr-defined]
    assert context.params["host"] == "0.0.0.0", "nobody outside the container would reach it"


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_has_no_more_than_the_build_made(stages: dict[str, Stage], image: str) -> None:
    stage = stages[image]
    assert stage.base == "base"
    assert stage.values("COPY") == [f"--from=build-{image} /opt/baton /opt/baton"]
    runs = " ".join(stages[f"build-{image}"].values("RUN"))
    assert f"install.sh libraries {image}" in runs
    assert "install.sh sbom" in runs


def test_libraries_are_a_layer_that_a_change_of_the_code_keeps(stages: dict[str, Stage]) -> None:
    for image in IMAGES:
        instructions = [f"{name} {value}" for name, value in stages[f"build-{image}"].steps]
        libraries = next(i for i, text in enumerate(instructions) if "libraries" in text)
        assert libraries < instructions.index("COPY . /src")


def test_all_that_is_copied_is_there(stages: dict[str, Stage]) -> None:
    patterns = (FOLDER / "Dockerfile.dockerignore").read_text()
    sources = [
        source
        for stage in stages.values()
        for value in stage.values("COPY")
        if not value.startswith("--from")
        for source in value.split()[:-1]
        if source != "."
    ]
    assert "deploy/docker/install.sh" in sources
    for source in sources:
        assert (ROOT / source).is_file()
        assert not ignored(source, patterns)


def test_the_context_has_what_the_wheel_is_made_of_and_nothing_else() -> None:
    patterns = (FOLDER / "Dockerfile.dockerignore").read_text()
    for link in (ROOT / "baton").iterdir():
        if link.name == "__pycache__":
            continue
        assert not ignored(f"baton/{link.name}", patterns)
        if link.is_symlink():
            assert not ignored(f"{link.resolve().name}/__init__.py", patterns), link
    for name in (".git/config", ".venv/bin/python", "tests/conftest.py", "bench/run.py", "key.pem"):
        assert ignored(name, patterns), name
    assert ignored("core/__pycache__/ids.pyc", patterns)
    assert ignored("demo_model/.checkpoints/1/model.pt", patterns)


def test_every_version_is_said_once() -> None:
    baton, image = pins(ROOT / "constraints.txt"), pins(FOLDER / "image-constraints.txt")
    assert not baton.keys() & image.keys()
    assert {"hatchling", "cyclonedx-bom", "aiohttp", "proto-plus"} <= image.keys()
    build = re.search(r'requires = \["hatchling==(.+)"\]', (ROOT / "pyproject.toml").read_text())
    assert build is not None
    assert image["hatchling"] == build[1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["libraries", "rocm"], "libraries: 'rocm' is not allowed; allowed: cpu, cuda"),
        (["libraries"], "libraries: '' is not allowed; allowed: cpu, cuda"),
        (["everything"], "'everything' is not allowed; allowed: libraries, baton, sbom"),
        ([], "'' is not allowed; allowed: libraries, baton, sbom"),
    ],
)
def test_the_installer_names_what_is_allowed(arguments: list[str], said: str) -> None:
    command = ["sh", str(FOLDER / "install.sh"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr == f"install.sh {said}\n"


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not installed")
def test_hadolint_finds_nothing() -> None:
    done = subprocess.run(
        ["hadolint", str(DOCKERFILE)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout


def test_the_reader_reads_what_docker_reads() -> None:
    text = "ARG V=1\nFROM debian:${V} AS a\nENV A=1 \\\n    B='x y'\n# note\nRUN one; \\\n    two\n"
    [stage] = parse(text + 'CMD ["c"]\n')
    assert (stage.name, stage.base) == ("a", "debian:${V}")
    assert stage.environment() == {"A": "1", "B": "x y"}
    assert shlex.split(stage.values("RUN")[0]) == ["one;", "two"]


@pytest.mark.parametrize(
    "line", ["ONBUILD RUN x", "RUN --mount=type=secret x", "FROM a", "RUN <<EOF"]
)
def test_the_reader_refuses_what_it_does_not_know(line: str) -> None:
    with pytest.raises(ValueError, match=re.escape(line)):
        parse(f"FROM x AS y\n{line}\n")


@pytest.mark.parametrize(
    ("path", "out"), [("a/b", True), ("keep/x", False), ("keep/no/x", True), ("deep/in/x", False)]
)
def test_the_last_pattern_that_fits_decides(path: str, *, out: bool) -> None:
    assert ignored(path, "*\n!keep\nkeep/no\n!deep/in\n") is out
