"""deploy/docker/compose.yaml fits the image, the command line and Prometheus' files."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from baton.cli.main import app

from .dockerfile import parse

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "docker"


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    services: dict[str, Any] = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]
    return services


def test_it_builds_a_stage_that_exists_from_the_repo(services: dict[str, Any]) -> None:
    build = services["baton"]["build"]
    context = (FOLDER / build["context"]).resolve()
    assert context == ROOT
    stages = [stage.name for stage in parse((context / build["dockerfile"]).read_text())]
    assert build["target"] in stages


def test_its_command_is_one_of_baton_on_ports_that_are_published(services: dict[str, Any]) -> None:
    baton = services["baton"]
    name, command, *arguments = baton["command"]
    assert name == "baton"
    params = get_command(app).commands[command].make_context(command, arguments).params  # type: ignore[attr-defined]
    assert params["host"] == "0.0.0.0"
    ports = {tuple(port.split(":")) for port in baton["ports"]}
    wanted = {("127.0.0.1", str(params[key]), str(params[key])) for key in ("port", "grpc_port")}
    assert ports == wanted, "the demo has no keys: nobody but this machine may reach it"


def test_all_that_it_mounts_is_there(services: dict[str, Any]) -> None:
    volumes = services["prometheus"]["volumes"]
    assert len(volumes) == 2
    for volume in volumes:
        assert (FOLDER / volume.split(":")[0]).is_file(), volume


def test_prometheus_asks_the_gateway_and_loads_the_rules(services: dict[str, Any]) -> None:
    config = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yaml").read_text())
    [job] = config["scrape_configs"]
    host, port = job["static_configs"][0]["targets"][0].split(":")
    assert host in services
    assert any(port == published.split(":")[2] for published in services[host]["ports"])
    assert "--open-metrics" in services[host]["command"], "it has no key"
    inside = {volume.split(":")[1] for volume in services["prometheus"]["volumes"]}
    assert set(config["rule_files"]) < inside
