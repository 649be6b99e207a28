"""Nothing that is read from a socket can run code, and no secret is an argument of a command."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from baton.cli.main import app
from tests.test_layering import LEVELS, ROOT, imports_of

CODE_IN_DATA = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve"}
"""Modules whose reading of data can call anything."""
BY_PICKLE = {
    "multiprocessing.connection",
    "multiprocessing.managers",
    "torch.distributed.rpc",
    "torch.distributed.broadcast_object_list",
    "torch.distributed.all_gather_object",
    "torch.distributed.gather_object",
    "torch.distributed.scatter_object_list",
    "torch.distributed.send_object_list",
    "torch.distributed.recv_object_list",
}
"""What would do so for us."""
CALLS = {name.rpartition(".")[2] for name in BY_PICKLE if "object" in name}


def pickles(source: str) -> Iterator[str]:
    """Find what reads or writes pickles, or would run what it reads."""
    for name, line in imports_of(source):
        if name.partition(".")[0] in CODE_IN_DATA or any(
            name == by or name.startswith(f"{by}.") for by in BY_PICKLE
        ):
            yield f"line {line}: {name}"
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Attribute(attr=name) if name in CALLS:
                yield f"line {node.lineno}: {name}"
            case ast.Call(ast.Attribute(ast.Name("torch"), "load"), _, words):
                given = {word.arg: word.value for word in words}
                weights = given.get("weights_only")
                if not (isinstance(weights, ast.Constant) and weights.value is True):
                    yield f"line {node.lineno}: torch.load without weights_only=True"
            case ast.Call(ast.Attribute(ast.Name("yaml"), "load" | "load_all" | "unsafe_load")):
                yield f"line {node.lineno}: yaml.{node.func.attr}"
            case ast.Call(ast.Name("eval" | "exec")):
                yield f"line {node.lineno}: {node.func.id}"


@pytest.mark.parametrize("folder", sorted(LEVELS))
def test_no_folder_pickles(folder: str):
    """Ray does, between its own processes: cluster/ray_calls.py keeps strangers from them."""
    found = [
        f"{path.relative_to(ROOT)}: {what}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for what in pickles(path.read_text())
    ]
    assert not found


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ("import pickle", True),
        ("from cloudpickle import dumps", True),
        ("def f():\n    import marshal", True),
        ("from multiprocessing.connection import Listener", True),
        ("from torch.distributed import all_gather_object", True),
        ("import torch.distributed as dist\ndist.broadcast_object_list([1])", True),
        ("import torch\ntorch.load('x')", True),
        ("import torch\ntorch.load('x', weights_only=True)", False),
        ("import yaml\nyaml.load('x', yaml.Loader)", True),
        ("import yaml\nyaml.safe_load('x')", False),
        ("eval('1')", True),
        ("model.eval()", False),
        ("import multiprocessing.shared_memory", False),
    ],
)
def test_a_pickle_is_found(source: str, wrong: bool):
    assert bool(list(pickles(source))) == wrong


def test_no_option_takes_a_secret():
    """`ps` shows every user what a command was started with: secrets come by file, by variable."""

    def options(command: object, path: str) -> Iterator[str]:
        for option in getattr(command, "params", ()):
            yield from (f"{path} {name}" for name in option.opts)
        for name, child in getattr(command, "commands", {}).items():
            yield from options(child, f"{path} {name}")

    named = list(options(typer.main.get_command(app), "baton"))
    assert "baton serve --api-keys" in named, "and that is a file"
    words = ("secret", "token", "password", "api-key")
    files = {"baton serve --api-keys"}
    counts = ("max-tokens", "batch-tokens")
    found = [
        option
        for option in named
        if any(word in option for word in words) and not option.endswith(counts)
    ]
    assert set(found) == files


def test_a_secret_of_the_cluster_is_not_shown():
    from baton.core.config import HandoverConfig

    config = HandoverConfig().with_secret()
    secret = config.secret.get_secret_value()
    assert len(secret) >= 16
    assert secret not in repr(config) + str(config) + str(config.model_dump())


def test_private_keys_and_the_keys_of_tenants_are_for_their_owner(tmp_path: Path):
    from baton.cli.certs import write_certs

    for path in write_certs(tmp_path):
        assert (path.stat().st_mode & 0o077 == 0) == (path.suffix == ".key"), path
