"""What `baton explain` prints, and what it says when nobody or nothing is there."""

import http.server
import io
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from rich.console import Console

from baton.cli.explain import explain
from baton.core.errors import InvalidRequest, Unavailable

TOLD: dict[str, Any] = {
    "request_id": "cmpl-1",
    "decisions": [
        {
            "decided": "the least predicted cost",
            "membership_version": 3,
            "state_version": 77,
            "blind_candidates": 1,
            "prompt_tokens": 112,
            "expected_output_tokens": 16.0,
            "decode": [
                {
                    "instance": f"decode-{n}",
                    "cached_tokens": 96 * n,
                    "running": 2,
                    "context_tokens": 300,
                    "short_tokens": 0,
                    "handover_s": 0.0021,
                    "local_s": 0.0314,
                    "ttft_s": 0.0123,
                    "tpot_s": 0.0045,
                    "cost_s": 0.0798,
                }
                for n in (1, 0)
            ],
            "decode_candidates": 9,
            "prefill": [
                {
                    "instance": "prefill-3",
                    "cached_tokens": 64,
                    "queued_tokens": 17,
                    "prefill_s": 0.01,
                }
            ],
            "prefill_candidates": 1,
            "chosen": {
                "decode": "decode-1",
                "prefill": "prefill-3",
                "ttft_s": 0.0123,
                "tpot_s": 0.0045,
                "cost_s": 0.0798,
            },
            "regret_s": 0.0007,
        }
    ],
    "measured": {
        "decode": "decode-1",
        "prefill": "prefill-3",
        "ttft_s": 0.0111,
        "tpot_s": 0.0044,
        "output_tokens": 12,
        "cached_tokens": 96,
        "finish": "length",
        "error": "",
        "attempts": ["prefill-3: ok"],
        "migrations": 0,
    },
}


class _Gateway(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        known = self.path == "/v1/requests/cmpl-1/explain"
        self.send_response(200 if known else 404)
        self.end_headers()
        self.wfile.write(json.dumps(TOLD if known else {}).encode())

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    server = http.server.HTTPServer(("127.0.0.1", 0), _Gateway)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_it_prints_candidates_predictions_and_what_came(url: str) -> None:
    page = io.StringIO()
    explain(url, "cmpl-1", Console(file=page, width=100))
    text = " ".join(page.getvalue().split())
    for words in (
        "request cmpl-1",
        "chosen: prefill-3 → decode-1, by the least predicted cost",
        "predicted: TTFT 12.3 ms, TPOT 4.5 ms; regret, as far as is known now: 0.7 ms",
        "decode (2 of 9)",
        "decode-0",
        "measured: TTFT 11.1 ms, TPOT 4.4 ms on prefill-3 → decode-1",
        "96 tokens were cached, 12 came, length",
    ):
        assert words in text, text


def test_a_forgotten_request_and_a_missing_gateway_are_told(url: str) -> None:
    console = Console(file=io.StringIO())
    with pytest.raises(InvalidRequest, match=r"REQUEST_ID.*lately"):
        explain(url, "cmpl-2", console)
    with pytest.raises(Unavailable, match="no gateway answers"):
        explain("http://127.0.0.1:1", "cmpl-1", console)
