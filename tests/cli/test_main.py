"""Mistakes are refused in one sentence, at once, with exit status 2."""

import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from baton import __version__
from baton.cli.main import app


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def refused(*arguments: str) -> str:
    """Run a command that must be refused before anything starts; return what it says."""
    result = run("serve", *arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert "starting Ray" not in result.output
    return result.output


def test_version() -> None:
    assert run("version").output == f"baton {__version__}\n"


def test_a_port_in_use(taken_port: int) -> None:
    said = refused("--port", str(taken_port))
    assert f"--port: {taken_port} is not allowed" in said
    assert f"--grpc-port: {taken_port}" in refused("--port", "0", "--grpc-port", str(taken_port))


def test_one_port_for_two_apis(free_port: int) -> None:
    assert "--grpc-port" in refused("--port", str(free_port), "--grpc-port", str(free_port))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--block-size", "12"), "block_size: 12 is not allowed"),
        (("--decode", "0"), "decode: 0 is not allowed"),
        (("--prefill", "-1"), "prefill: -1 is not allowed"),
        (("--prefill-tp", "0"), "tp: 0 is not allowed"),
        (("--prefill-dp", "0"), "dp: 0 is not allowed"),
        (("--decode-ep", "300"), "ep: 300 is not allowed"),
        (("--max-batch-tokens", "1"), "max_batch_tokens: 1 is not allowed"),
        (("--port", "70000"), "http_port: 70000 is not allowed"),
        (("--executor", "gpu"), "executor: 'gpu' is not allowed"),
        (("--decode-kv-dtype", "float8"), "decode_kv_dtype: 'float8' is not allowed"),
        (("--policy", "lifo"), "policy: 'lifo' is not allowed"),
        (("--max-model-len", "100000"), "--max-model-len: 100000 is not allowed"),
        (("--kv-memory-mib", "900000000000"), "kv_memory_mib"),
        (("--kv-memory-mib", "1000000"), "--kv-memory-mib: 1000000 is not allowed"),
    ],
)
def test_a_value_out_of_range(arguments: tuple[str, ...], words: str) -> None:
    assert words in refused(*arguments)


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    assert "config.json" in refused("--model", str(tmp_path))


def test_an_architecture_that_is_not_supported(tmp_path: Path, demo_model_dir: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(demo_model_dir, folder)
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["GPT2LMHeadModel"]
    (folder / "config.json").write_text(json.dumps(config))
    assert "GPT2LMHeadModel" in refused("--model", str(folder))


def test_too_little_memory_for_one_block(tmp_path: Path, demo_model_dir: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(demo_model_dir, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_hidden_layers": 80, "head_dim": 128}
    (folder / "config.json").write_text(json.dumps(config))
    assert "one block" in refused("--model", str(folder), "--kv-memory-mib", "1")


def test_no_server_to_ask(free_port: int) -> None:
    result = run("generate", "x", "--address", f"127.0.0.1:{free_port}")
    assert result.exit_code == 1
    assert result.output.startswith("Error: ")


def test_doctor_tells_what_is_here_and_what_is_used() -> None:
    result = run("doctor")
    assert result.exit_code == 0, result.output
    for part in (
        "Python",
        "torch",
        "UCX",
        "Ray",
        "cma",
        "/dev/shm",
        "GPU kernels",
        "Baton can run here",
    ):
        assert part in result.output


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
