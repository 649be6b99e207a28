"""The chart's own Redis: Ray's head finds it, nobody else does, and it asks for the password."""

import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.chart import NAME, Document, of_kind, one, rendered

TIMEOUT_S = 120.0
OWN: Document = {"redis": {"bundled": {"enabled": True}, "passwordSecret": "redis"}}
NAMED: Document = {"redis": {"address": "elsewhere:6380", "passwordSecret": "redis"}}


def options(documents: list[Document]) -> dict[str, Any]:
    found: dict[str, Any] = one(documents, "RayCluster")["spec"]["gcsFaultToleranceOptions"]
    return found


def ports_out(documents: list[Document]) -> list[int]:
    (pods,) = [
        p for p in of_kind(documents, "NetworkPolicy") if p["metadata"]["name"] == f"{NAME}-pods"
    ]
    rules = [rule for rule in pods["spec"]["egress"] if "to" not in rule]
    return [port["port"] for rule in rules for port in rule["ports"]]


def test_rays_head_finds_the_charts_redis_or_the_named_one_or_has_none() -> None:
    documents = rendered(OWN)
    host, _, port = options(documents)["redisAddress"].partition(":")
    (service,) = [s for s in of_kind(documents, "Service") if s["metadata"]["name"] == host]
    assert [p["port"] for p in service["spec"]["ports"]] == [int(port)]
    assert int(port) in ports_out(documents)
    named = rendered(NAMED)
    assert options(named)["redisAddress"] == "elsewhere:6380"
    assert 6380 in ports_out(named)
    assert not of_kind(named, "StatefulSet")
    assert "gcsFaultToleranceOptions" not in one(rendered({}), "RayCluster")["spec"]


def test_both_sides_take_the_password_from_one_secret() -> None:
    documents = rendered(OWN)
    (container,) = one(documents, "StatefulSet")["spec"]["template"]["spec"]["containers"]
    (password,) = container["env"]
    assert password["valueFrom"] == options(documents)["redisPassword"]["valueFrom"]
    assert password["name"] in container["args"][0]


def test_only_the_clusters_pods_reach_it() -> None:
    (policy,) = [
        p
        for p in of_kind(rendered(OWN), "NetworkPolicy")
        if p["metadata"]["name"] == f"{NAME}-redis"
    ]
    ((rule),) = policy["spec"]["ingress"]
    assert rule["from"] == [{"podSelector": {"matchLabels": {"ray.io/cluster": NAME}}}]
    assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
    assert "egress" not in policy["spec"]


def told(path: Path, *lines: str) -> list[str]:
    """Return what Redis answers to some lines, as soon as it listens and has read its data."""
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(TIMEOUT_S)
            try:
                connection.connect(str(path))
                connection.sendall("".join(f"{line}\r\n" for line in lines).encode())
                file = connection.makefile("r", newline="\r\n")
                answers = [file.readline().strip() for _ in lines]
            except OSError:
                answers = ["-LOADING"]
        if not any(answer.startswith("-LOADING") for answer in answers):
            return answers
        time.sleep(0.02)
    raise AssertionError("Redis never served")


@pytest.mark.skipif(shutil.which("redis-server") is None, reason="redis-server is not installed")
def test_the_containers_command_starts_one_that_asks_for_the_password_and_keeps_what_it_has() -> (
    None
):
    (container,) = one(rendered(OWN), "StatefulSet")["spec"]["template"]["spec"]["containers"]
    password = "with spaces and #"
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="b-") as folder:
        path = Path(folder) / "socket"
        script = container["args"][0].replace("--port 6379", f"--port 0 --unixsocket {path}")
        assert script != container["args"][0]
        for expected in ("$-1", "$1"):
            process = subprocess.Popen(
                [*container["command"], script.replace("/data", folder)],
                env={"PATH": os.environ["PATH"], "REDIS_PASSWORD": password},
                stdout=subprocess.DEVNULL,
            )
            try:
                assert told(path, "GET key")[0].startswith("-NOAUTH")
                answers = told(path, f'AUTH "{password}"', "GET key")
                assert answers == ["+OK", expected]
                assert told(path, f'AUTH "{password}"', "SET key 1") == ["+OK", "+OK"]
            finally:
                process.terminate()  # it is Redis that gets it, as in a pod, and saves
                assert process.wait(TIMEOUT_S) == 0
