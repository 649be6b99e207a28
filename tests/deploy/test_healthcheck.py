"""The image's health check, run as a program against real servers."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

PROGRAM = Path(__file__).resolve().parents[2] / "deploy" / "docker" / "healthcheck.py"


class Gateway(BaseHTTPRequestHandler):
    """Answers as a gateway does."""

    def do_GET(self) -> None:
        well = self.path == "/health"
        self.send_response(200 if well else 503)
        self.end_headers()
        self.wfile.write(b"{}" if well else b'{"reasons": ["no decode instance"]}')

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (its base's name)
        """Say nothing."""


@pytest.fixture
def url() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Gateway) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def ask(url: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(PROGRAM)],
        env={**os.environ, "BATON_HEALTH_URL": url},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_gateway_that_can_serve_is_well(url: str) -> None:
    assert ask(f"{url}/health").returncode == 0


def test_one_that_cannot_is_not_and_says_why(url: str) -> None:
    done = ask(f"{url}/unwell")
    assert done.returncode == 1
    assert "no decode instance" in done.stderr


@pytest.mark.parametrize("bad", ["http://127.0.0.1:1/health", "nonsense"])
def test_none_at_all_is_not_well_either(bad: str) -> None:
    done = ask(bad)
    assert done.returncode == 1
    assert bad in done.stderr
    assert "Traceback" not in done.stderr
