"""The shape of the code: who may import whom, and where each outside library is at home.

The tables are those of docs/architecture.md. Every check is a pure function over source text, and
is shown to find a planted violation before it is trusted with the repo.
"""

import ast
import sys
from collections.abc import Iterable, Iterator, Mapping, Set
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent

LEVELS = {
    "core": 0,
    "proto": 1,
    "parallel": 1,
    "kernels": 1,
    "engine": 1,
    "kv_transfer": 2,
    "models": 2,
    "router": 2,
    "client": 2,
    "executor": 3,
    "api": 3,
    "prefill_worker": 4,
    "decode_worker": 4,
    "cluster": 5,
    "cli": 6,
}
"""A folder imports only folders of lower levels."""

UNLEVELLED = {"bench", "tests", "demo_model"}
"""They import what they like, and no folder imports them."""

_TORCH_HOMES = {"parallel", "kernels", "models", "executor"}
_GRPC_HOMES = {"proto", "api", "prefill_worker", "decode_worker"}
HOMES = {
    "pydantic": {"core", "api"},
    "structlog": {"core"},
    "prometheus_client": {"core", "api"},
    "opentelemetry": {"core"},
    "xxhash": {"core"},
    "yaml": {"core"},
    "google": {"proto"},
    "grpc_tools": {"proto"},
    "grpc": _GRPC_HOMES | {"client"},
    "grpc_health": _GRPC_HOMES,
    "grpc_reflection": _GRPC_HOMES,
    "msgpack": {"kv_transfer", "executor"},
    "libucx": {"kv_transfer"},
    "triton": {"kernels"},
    "torch": _TORCH_HOMES,
    "numpy": {"core", "kv_transfer", "router"} | _TORCH_HOMES,
    "safetensors": {"models"},
    "tokenizers": {"models"},
    "transformers": {"models"},
    "jinja2": {"models"},
    "jsonschema": {"api"},
    "llguidance": {"models"},
    "cryptography": {"cli"},
    "fastapi": {"api"},
    "starlette": {"api"},
    "uvicorn": {"api"},
    "h11": {"api"},
    "httpx": {"cli", "client"},
    "ray": {"cluster"},
    "rich": {"cli"},
    "typer": {"cli"},
}
"""The folders that may import an outside library; one that is not here may be imported nowhere."""

PROBES = {"cli/doctor.py": {"ray", "torch"}}
"""Files that import a library only to see whether it works on this machine."""


class Import(NamedTuple):
    """One imported name, such as `baton.core.ids.SeqId`; relative ones keep their dots."""

    name: str
    line: int


def imports_of(source: str) -> Iterator[Import]:
    """Find every import, in functions and under TYPE_CHECKING too, and by literal name."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names):
                yield from (Import(alias.name, node.lineno) for alias in names)
            case ast.ImportFrom(module, names, level):
                base = "." * level + (module or "")
                joint = "" if base.endswith(".") else "."
                yield from (Import(f"{base}{joint}{alias.name}", node.lineno) for alias in names)
            case ast.Call(
                ast.Name("__import__") | ast.Attribute(attr="import_module"),
                [ast.Constant(str(name)), *_],
            ):
                yield Import(name, node.lineno)


def wrong_levels(folder: str, imports: Iterable[Import]) -> Iterator[str]:
    """Find imports of folders that are not below `folder`."""
    for name, line in imports:
        root, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if root != "baton" or target == folder:
            continue
        if target in UNLEVELLED or LEVELS.get(target, -1) >= LEVELS[folder]:
            yield f"line {line}: {folder} may not import {name}"


def wrong_homes(
    folder: str, imports: Iterable[Import], probes: Set[str] = frozenset()
) -> Iterator[str]:
    """Find outside libraries that are neither at home in `folder` nor probed here."""
    for name, line in imports:
        root = name.partition(".")[0]
        if root in {"", "baton", *LEVELS, *sys.stdlib_module_names, *probes}:
            continue
        if folder not in HOMES.get(root, set()):
            yield f"line {line}: {root} is not at home in {folder}"


def wrong_names(imports: Iterable[Import]) -> Iterator[str]:
    """Find folders imported without `baton.`."""
    for name, line in imports:
        if name.partition(".")[0] in LEVELS:
            yield f"line {line}: {name} must be imported as baton.{name}"


def relative_names(imports: Iterable[Import]) -> Iterator[str]:
    """Find relative imports: a module has one name."""
    return (f"line {line}: {name} is relative" for name, line in imports if name.startswith("."))


def sleeps(source: str) -> Iterator[str]:
    """Find calls and imports of time.sleep: it blocks a thread, and waits for nothing."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Attribute(ast.Name("time"), "sleep"):
                yield f"line {node.lineno}: time.sleep"
            case ast.ImportFrom("time", names) if any(alias.name == "sleep" for alias in names):
                yield f"line {node.lineno}: time.sleep"


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """Return modules that import each other in a ring, or nothing."""
    done: set[str] = set()

    def walk(node: str, path: list[str]) -> list[str]:
        if node in path:
            return path[path.index(node) :]
        if node in done:
            return []
        for target in sorted(graph.get(node, ())):
            if found := walk(target, [*path, node]):
                return found
        done.add(node)
        return []

    for start in sorted(graph):
        if found := walk(start, []):
            return found
    return []


def import_graph(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """Return which of these modules (by dotted name) import which."""
    graph: dict[str, set[str]] = {}
    for module, source in sources.items():
        targets = set()
        for name, _ in imports_of(source):
            parent = name.rpartition(".")[0]
            targets |= {name if name in sources else parent} & sources.keys()
        graph[module] = targets
    return graph


def modules(folder: str) -> dict[str, Path]:
    """Return the Python files of a folder by dotted name."""
    found = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        found[f"baton.{name}"] = path
    return found


def python_folders() -> set[str]:
    """Return the repo's folders that are packages."""
    return {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"baton"}


def sources(*folders: str) -> list[tuple[str, Path]]:
    """Return (folder, file) of every Python file in `folders`."""
    return [(folder, path) for folder in folders for path in modules(folder).values()]


# The repo


@pytest.mark.parametrize("folder", sorted(python_folders() & LEVELS.keys()))
def test_folder_keeps_its_place(folder: str):
    found = []
    for _, path in sources(folder):
        source = path.read_text()
        imports = list(imports_of(source))
        problems = [
            *wrong_levels(folder, imports),
            *wrong_homes(folder, imports, PROBES.get(str(path.relative_to(ROOT)), set())),
            *wrong_names(imports),
            *relative_names(imports),
            *sleeps(source),
        ]
        found += [f"{path.relative_to(ROOT)} {problem}" for problem in problems]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("folder", sorted(python_folders()))
def test_folder_has_no_import_circle(folder: str):
    texts = {name: path.read_text() for name, path in modules(folder).items()}
    assert not circle(import_graph(texts))


def test_everybody_imports_baton_by_its_name():
    found = []
    for _, path in sources(*sorted(UNLEVELLED)):
        problems = wrong_names(imports_of(path.read_text()))
        found += [f"{path.relative_to(ROOT)} {problem}" for problem in problems]
    assert not found, "\n".join(found)


def test_every_folder_has_a_level():
    assert python_folders() <= LEVELS.keys() | UNLEVELLED


def test_links_and_folders_are_in_step():
    links = {path.name: path for path in (ROOT / "baton").iterdir() if path.is_symlink()}
    assert python_folders() <= links.keys()
    for name, link in links.items():
        assert link.readlink() == Path("..", name)
        assert any(link.glob("*.py")), f"baton/{name} leads to no Python folder"
    files = {path.name for path in (ROOT / "baton").iterdir()} - links.keys()
    assert files - {"__pycache__"} == {"__init__.py", "py.typed"}


# The checks find what they are for


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("import a.b, c", ["a.b", "c"]),
        ("from a.b import c as d, e", ["a.b.c", "a.b.e"]),
        ("from . import a", [".a"]),
        ("from ..a import b", ["..a.b"]),
        ("def f():\n    import a", ["a"]),
        ("if TYPE_CHECKING:\n    from a import b", ["a.b"]),
        ("import importlib\nimportlib.import_module('a.b')", ["importlib", "a.b"]),
        ("__import__('a')", ["a"]),
        ("x = 'import a'", []),
    ],
)
def test_imports_are_found(source: str, names: list[str]):
    assert [found.name for found in imports_of(source)] == names


@pytest.mark.parametrize(
    ("folder", "source", "wrong"),
    [
        ("engine", "from baton.core.ids import SeqId", False),
        ("engine", "from baton.engine.step import StepPlan", False),
        ("engine", "from baton import __version__", False),
        ("engine", "from baton.executor.runner import ModelRunner", True),
        ("engine", "def f():\n    from baton.kv_transfer import plan", True),
        ("engine", "if TYPE_CHECKING:\n    import baton.models.llama", True),
        ("core", "from baton import engine", True),
        ("prefill_worker", "import baton.decode_worker.worker", True),
        ("cli", "from baton.demo_model import train", True),
        ("cli", "from baton.cluster.local_cluster import LocalCluster", False),
    ],
)
def test_a_wrong_level_is_found(folder: str, source: str, wrong: bool):
    assert bool(list(wrong_levels(folder, imports_of(source)))) == wrong


@pytest.mark.parametrize(
    ("folder", "source", "wrong"),
    [
        ("executor", "import torch", False),
        ("engine", "import torch", True),
        ("kv_transfer", "from torch import Tensor", True),
        ("api", "def f():\n    import ray", True),
        ("cluster", "import ray.util", False),
        ("cluster", "import grpc", True),
        ("engine", "import xxhash", True),
        ("core", "import requests", True),
        ("core", "import asyncio.events, collections.abc", False),
        ("core", "from baton.core import ids", False),
    ],
)
def test_a_library_away_from_home_is_found(folder: str, source: str, wrong: bool):
    assert bool(list(wrong_homes(folder, imports_of(source)))) == wrong


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ("import router", True),
        ("from proto import worker_pb2", True),
        ("from engine.step import StepPlan", True),
        ("import baton.router", False),
        ("import routers", False),
    ],
)
def test_a_wrong_name_is_found(source: str, wrong: bool):
    assert bool(list(wrong_names(imports_of(source)))) == wrong


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ("import time\ntime.sleep(1)", True),
        ("from time import monotonic, sleep", True),
        ("wait = time.sleep", True),
        ("import time\ntime.monotonic()", False),
        ("event.sleep()", False),
    ],
)
def test_a_sleep_is_found(source: str, wrong: bool):
    assert bool(list(sleeps(source))) == wrong


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ("from . import step", True),
        ("from .step import StepPlan", True),
        ("from ..core import ids", True),
        ("from baton.engine import step", False),
    ],
)
def test_a_relative_import_is_found(source: str, wrong: bool):
    assert bool(list(relative_names(imports_of(source)))) == wrong


def test_a_circle_is_found():
    texts = {
        "baton.x": "",
        "baton.x.a": "from baton.x import b",
        "baton.x.b": "def f():\n    from baton.x.c import g",
        "baton.x.c": "if TYPE_CHECKING:\n    from baton.x.a import h",
        "baton.x.d": "from baton.x.a import h",
    }
    assert circle(import_graph(texts)) == ["baton.x.a", "baton.x.b", "baton.x.c"]
    del texts["baton.x.c"]
    assert circle(import_graph(texts)) == []


def test_a_package_that_imports_its_module_which_imports_it_is_a_circle():
    texts = {"baton.x": "from baton.x.a import f", "baton.x.a": "from baton.x import g"}
    assert circle(import_graph(texts)) == ["baton.x", "baton.x.a"]
