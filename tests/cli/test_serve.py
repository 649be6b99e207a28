"""`baton serve` as its users meet it: the real command, Ray, instances, signals."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from baton.cluster.processes import wait_gone

Start = Callable[..., Any]
ANY_PORT = ("serve", "--port", "0", "--grpc-port", "0", "--kv-memory-mib", "16")


def generate(address: str) -> str:
    options = ("--address", address, "--temperature", "0", "--max-tokens", "12")
    done = subprocess.run(
        [sys.executable, "-m", "baton.cli.main", "generate", "def is_prime(n):\n", *options],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout


@pytest.mark.timeout(300)
def test_it_serves_heals_and_leaves_nothing(baton: Start) -> None:
    server = baton(*ANY_PORT)
    pid = int(re.findall(r"pid (\d+)", server.wait_for("decode-0    pid"))[0])
    http_url = server.wait_for("OpenAI HTTP API").split()[-1].removesuffix("/v1")
    address = server.wait_for("gRPC API").split()[-1]
    server.wait_for("Ctrl-C stops everything")
    text = generate(address)
    assert len(text.strip()) > 5

    os.kill(pid, signal.SIGKILL)
    server.wait_for("decode-0 is lost")
    server.wait_for("decode-0 is back")
    with httpx.Client(base_url=http_url, trust_env=False, timeout=60) as http:
        while http.get("/health").status_code != 200:
            pass  # the gateway connects to it first
        assert generate(address) == text
        request = {"model": "baton-demo", "prompt": "x", "max_tokens": 2}
        answer = http.post("/v1/completions", json=request)
        assert answer.json()["usage"]["completion_tokens"] == 2

    assert server.end(signal.SIGTERM) == 0, "\n".join(server.lines)
    server.assert_nothing_left()


@pytest.mark.parametrize("moment", ["starting Ray", "starting prefill-0"])
def test_ctrl_c_while_it_starts_leaves_nothing(baton: Start, moment: str) -> None:
    server = baton(*ANY_PORT)
    server.wait_for(moment)
    assert server.end(signal.SIGINT) == 128 + signal.SIGINT, "\n".join(server.lines)
    assert "Traceback" not in "\n".join(server.lines)
    server.assert_nothing_left()


async def test_its_own_violent_death_takes_everything_along(baton: Start) -> None:
    server = baton(*ANY_PORT)
    server.wait_for("starting prefill-0")
    others = server.processes() - {server.process.pid}
    assert len(others) > 3
    server.end(signal.SIGKILL)
    await wait_gone(others, 30.0)
    server.assert_nothing_left()


def test_it_ends_with_an_error_when_ray_ends(baton: Start) -> None:
    server = baton(*ANY_PORT)
    pid = int(re.findall(r"pid (\d+)", server.wait_for("Ray is up"))[0])
    server.wait_for("Ctrl-C stops everything")
    os.kill(pid, signal.SIGTERM)
    assert server.end() == 1, "\n".join(server.lines)
    assert "Ray has ended" in "\n".join(server.lines)
    server.assert_nothing_left()
