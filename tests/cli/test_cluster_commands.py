"""`baton up` and what follows as users meet it: real commands, Ray, instances, a gateway."""

import json
import os
import re
import shutil
import signal
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from baton.cli.main import app
from baton.cluster.processes import session_members

Start = Callable[..., Any]

SPEC = """\
host: 127.0.0.1
cpus: 3
models:
  - name: baton-demo
    dir: {model}
    engine: {{kv_memory_mib: 16}}
    pools:
      prefill:
      decode:
    gateways: {{http_port: 0, grpc_port: 0}}
"""


@pytest.fixture
def spec(tmp_path: Path, demo_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A spec's file; the note of its cluster lies in `tmp_path`, too."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    path = tmp_path / "cluster.yaml"
    path.write_text(SPEC.format(model=demo_model_dir))
    return path


def incarnations(lines: list[str]) -> list[str]:
    return re.findall(r"ready +1 +\d+ +\S+ +([0-9a-f]{16})", "\n".join(lines))


def done(command: Any) -> list[str]:
    """Wait for a command to end well; return its output."""
    assert command.end() == 0, "\n".join(command.lines)
    lines: list[str] = command.lines
    return lines


@pytest.mark.timeout(400)
def test_a_cluster_outlives_its_commands_and_its_controller(
    baton: Start, spec: Path, tmp_path: Path
) -> None:
    first = done(baton("up", "-f", str(spec)))
    note = tmp_path / "baton" / "cluster.json"
    assert stat.S_IMODE(note.stat().st_mode) == 0o600
    guard = json.loads(note.read_text())["guard"]
    try:
        assert len(session_members(guard)) > 5
        text = "\n".join(first)
        born = incarnations(first)
        assert len(born) == 2
        controller = int(re.findall(r"controller pid (\d+)", text)[0])
        url = re.findall(r"(http://\S+)/v1", text)[0]

        request = {"model": "baton-demo", "prompt": "def f():\n", "max_tokens": 24, "seed": 1}
        following = baton("events", "--follow")
        following.wait_for("ready")
        with httpx.Client(base_url=url, trust_env=False, timeout=120) as http:
            answer = http.post("/v1/completions", json=request).json()["choices"]
            os.kill(controller, signal.SIGKILL)
            assert http.post("/v1/completions", json=request).json()["choices"] == answer

        following.wait_for("adopt")
        following.end(signal.SIGINT)
        again = done(baton("up", "-f", str(spec)))
        assert any("nothing changes" in line for line in again)
        assert incarnations(again) == born, "the next controller adopted both"
        assert not any(f"controller pid {controller}," in line for line in again)
    finally:
        left = done(baton("down"))
    assert "nothing is left" in left[-1]
    assert session_members(guard) == {}
    assert not note.exists()


def refused(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return result.output


def test_a_bad_spec_is_refused_with_line_and_field(spec: Path) -> None:
    spec.write_text(spec.read_text().replace("kv_memory_mib: 16", "kv_memory_mib: none"))
    said = refused("up", "-f", str(spec))
    assert "cluster.yaml:6: models.0.engine.kv_memory_mib: 'none' is not allowed" in said


def test_a_model_that_is_none_is_refused(spec: Path, tmp_path: Path) -> None:
    spec.write_text(SPEC.format(model=tmp_path))
    assert "config.json" in refused("up", "-f", str(spec))
    spec.write_text(SPEC.format(model=tmp_path).replace("16}}", "16, max_model_len: 9999999}}"))
    assert "config.json" in refused("up", "-f", str(spec))


def test_a_limit_beyond_the_model_is_refused(spec: Path) -> None:
    spec.write_text(spec.read_text().replace("mib: 16", "mib: 16, max_model_len: 9999999"))
    assert "models.0.pools.prefill.engine.max_model_len" in refused("up", "-f", str(spec))


@pytest.mark.parametrize(
    "command", [("status",), ("scale", "decode", "2"), ("drain", "x"), ("flip", "x"), ("down",)]
)
def test_without_a_cluster_there_is_nothing_to_ask(spec: Path, command: tuple[str, ...]) -> None:
    assert "`baton up` has not started a Ray cluster" in refused(*command)


TWO_MODELS = """\
host: 127.0.0.1
cpus: 3
gateways: {{http_port: 0, grpc_port: 0}}
models:
  - name: baton-demo
    aliases: [code]
    dir: {model}
    engine: {{kv_memory_mib: 16}}
    pools: {{demo-mixed: {{role: mixed}}}}
  - name: other
    dir: {other}
    engine: {{kv_memory_mib: 16}}
    limits: {{max_output_tokens: 8}}
    pools: {{other-mixed: {{role: mixed}}}}
"""


def other_weights(demo_model_dir: Path, folder: Path) -> Path:
    """Make a model of the demo model's shape that says something else."""
    shutil.copytree(demo_model_dir, folder)
    (path,) = folder.glob("*.safetensors")
    weights = load_file(path)
    draw = torch.Generator().manual_seed(1)
    for name, weight in weights.items():
        if weight.ndim > 1:
            noise = torch.randn(weight.shape, generator=draw) * weight.float().std()
            weights[name] = noise.to(weight.dtype)
    save_file(weights, path, metadata={"format": "pt"})
    return folder


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_one_gateway_serves_two_models(
    baton: Start, spec: Path, tmp_path: Path, demo_model_dir: Path
) -> None:
    other = other_weights(demo_model_dir, tmp_path / "other")
    spec.write_text(TWO_MODELS.format(model=demo_model_dir, other=other))
    first = "\n".join(done(baton("up", "-f", str(spec))))
    try:
        assert re.search(r"^baton-demo +demo-mixed *$", first, re.MULTILINE)
        assert re.search(r"^other +other-mixed *$", first, re.MULTILINE)
        assert "baton-demo, other" in first
        url = re.findall(r"(http://\S+)/v1", first)[0]
        body = {"prompt": "def f():\n", "max_tokens": 8, "temperature": 0}
        with httpx.Client(base_url=url, trust_env=False, timeout=120) as http:

            def ask(name: str, **fields: object) -> Any:
                return http.post("/v1/completions", json={**body, "model": name, **fields})

            said = {name: ask(name).json() for name in ("baton-demo", "code", "other")}
            texts = {name: answer["choices"][0]["text"] for name, answer in said.items()}
            assert texts["baton-demo"] == texts["code"] != texts["other"]
            assert said["code"]["model"] == "baton-demo"
            assert ask("other", max_tokens=9).status_code == 400
            assert ask("nobody").status_code == 404
            rows = http.get("/v1/models").json()["data"]
            assert [row["id"] for row in rows] == ["baton-demo", "code", "other"]
    finally:
        done(baton("down"))
