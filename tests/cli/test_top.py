import io
from typing import Any

import pytest
from rich.console import Console

from baton.cli.top import TokenRate, top, view
from baton.core.errors import Unavailable

UP: dict[str, Any] = {
    "instance_id": "decode-0",
    "up": True,
    "draining": False,
    "problems": [],
    "open_requests": 3,
    "running": 2,
    "waiting": 1,
    "waited_s": 1.5,
    "steps": 77,
    "blocks_used": 50,
    "blocks_total": 100,
    "stats": {"blocks_cached": 20},
}
TOLD: dict[str, Any] = {
    "version": "1.2.3",
    "models": [{"name": "demo", "aliases": ["code"]}],
    "membership_version": 9,
    "problems": ["no prefill instance is ready [yet]"],
    "requests": {"open": 3, "waiting": 0, "prompt_tokens": 100, "output_tokens": 40},
    "last_minute": {"requests": 2, "ttft_s": {"p50": 0.02, "p99": 1.5}, "tpot_s": {}},
    "pools": [
        {
            "model": "demo",
            "role": "prefill",
            "size": 1,
            "instances": [{"instance_id": "prefill-0", "up": False}],
        },
        {"model": "demo", "role": "decode", "size": 1, "instances": [UP]},
    ],
    "recent": [
        {
            "request_id": "cmpl-1",
            "prompt_tokens": 50,
            "cached_tokens": 16,
            "output_tokens": 2,
            "ttft_s": 0.04,
            "tpot_s": 0.002,
            "finish": "length",
            "error": "",
            "ttft_spans": {"tokenize": 0.01, "local_compute": 0.03, "lost": 0.0},
        },
        {
            "request_id": "cmpl-2",
            "prompt_tokens": 50,
            "cached_tokens": 0,
            "output_tokens": 0,
            "ttft_s": 0.0,
            "tpot_s": 0.0,
            "finish": "error",
            "error": "deadline_exceeded",
            "ttft_spans": {"tokenize": 0.0},
        },
    ],
}


def text_of(told: dict[str, Any], rate: TokenRate) -> str:
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(view(told, rate))
    return console.export_text()


def test_everything_is_shown():
    shown = text_of(TOLD, TokenRate(lambda: 0.0))
    for words in (
        "! no prefill instance is ready [yet]",
        "TTFT p50 20.0 ms  p99 1.50 s",
        "TPOT none",
        "prefill 0/1",
        "silent",
        "█████▒▒···  50%  20%",
        "1.50 s",
        "local_compute 75%, tokenize 25%",
        "deadline_exceeded",
    ):
        assert words in shown


def test_tokens_per_second_are_those_since_the_last_look():
    now = 10.0
    rate = TokenRate(lambda: now)
    assert rate.seen(100, 10) is None
    now = 12.0
    assert rate.seen(150, 30) == (25.0, 10.0)
    now = 13.0
    assert rate.seen(5, 0) is None  # another gateway, or a new one
    now = 14.0
    assert rate.seen(6, 2) == (1.0, 2.0)


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "nonsense", "http://[", ""])
def test_nobody_at_home(url: str):
    with pytest.raises(Unavailable, match="no gateway answers"):
        top(url, Console(file=io.StringIO()), once=True)
