"""`baton top`: a running gateway's pools, queues and latency, live in the terminal."""

import contextlib
import os
import threading
from typing import Any

import httpx
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from baton.core.clock import Clock, monotonic
from baton.core.errors import Unavailable

_TIMEOUT_S = 10.0
_EVERY_S = 1.0
_MODELS = 8
"""Models that are named at the top."""
_RECENT = 8
"""Requests that are shown."""
_BAR = 10
"""Columns of a bar of KV blocks."""
_ID = 12
"""Characters of a request's id, the last ones, that are shown."""
_SPANS = 2
"""Of a request, that took longest."""

Json = dict[str, Any]


def top(url: str, console: Console, *, once: bool, clock: Clock = monotonic) -> None:
    """Show the gateway at `url` until Ctrl-C; raises Unavailable if it does not answer."""
    rate = TokenRate(clock)
    with _client(url) as http:
        first = view(_asked(http, url), rate)
        if once:
            console.print(first)
            return
        pause = threading.Event()  # nobody sets it: Ctrl-C ends the wait
        with (
            contextlib.suppress(KeyboardInterrupt),
            Live(first, console=console, auto_refresh=False, screen=console.is_terminal) as live,
        ):
            while not pause.wait(_EVERY_S):
                live.update(view(_asked(http, url), rate), refresh=True)


def _client(url: str) -> httpx.Client:
    key = os.environ.get("BATON_API_KEY", "")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        # trust_env: a proxy set for the internet has no part in a talk with one's own gateway.
        return httpx.Client(base_url=url, timeout=_TIMEOUT_S, headers=headers, trust_env=False)
    except httpx.InvalidURL as error:
        raise Unavailable(f"no gateway answers at {url}: {error}") from None


def _asked(http: httpx.Client, url: str) -> Json:
    try:
        response = http.get("/v1/status")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise Unavailable(f"no gateway answers at {url}: {error}") from None
    if response.status_code != httpx.codes.OK:
        raise Unavailable(f"the gateway at {url} answered {response.status_code}")
    answer: Json = response.json()
    return answer


class TokenRate:
    """Tokens per second between two looks: of prompts admitted, and of answers that ended."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._last: tuple[float, int, int] | None = None

    def seen(self, prompt_tokens: int, output_tokens: int) -> tuple[float, float] | None:
        """Return both rates since the last look; None at the first, or if the gateway is new."""
        now = (self._clock(), prompt_tokens, output_tokens)
        last, self._last = self._last, now
        if last is None or now[0] <= last[0] or now[1] < last[1] or now[2] < last[2]:
            return None
        seconds = now[0] - last[0]
        return (now[1] - last[1]) / seconds, (now[2] - last[2]) / seconds


def view(told: Json, rate: TokenRate) -> RenderableType:
    """Return what is shown of an answer of /v1/status."""
    parts: list[RenderableType] = [_head(told, rate)]
    parts += [f"[red]! {escape(problem)}[/]" for problem in told["problems"]]
    parts += ["", _instances(told["pools"]), "", _recent(told["recent"][:_RECENT])]
    return Group(*parts)


def _head(told: Json, rate: TokenRate) -> RenderableType:
    load, minute = told["requests"], told["last_minute"]
    rates = rate.seen(load["prompt_tokens"], load["output_tokens"])
    flow = "" if rates is None else f"   tokens/s in {rates[0]:.0f}, out {rates[1]:.0f}"
    return Group(
        f"[bold]{escape(_names(told['models']))}[/]   baton {escape(told['version'])}   "
        f"membership {told['membership_version']}",
        f"open {load['open']}, waiting for an instance {load['waiting']}{flow}",
        f"{minute['requests']} requests in the last minute",
        f"  TTFT {_spread(minute['ttft_s'])}",
        f"  TPOT {_spread(minute['tpot_s'])}",
    )


def _names(models: list[Json]) -> str:
    """Return the models, each with its aliases."""
    return ", ".join(
        " = ".join((model["name"], *model["aliases"])) for model in models[:_MODELS]
    ) + (f" and {len(models) - _MODELS} more" if len(models) > _MODELS else "")


def _spread(percentiles: dict[str, float]) -> str:
    return "  ".join(f"{name} {_ms(value)}" for name, value in percentiles.items()) or "none"


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _instances(pools: list[Json]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("pool", "instance", "state", "KV used/cached"):
        table.add_column(name, no_wrap=True)
    for name in ("open", "runs", "waits", "oldest", "steps"):
        table.add_column(name, justify="right", no_wrap=True)
    several = len({pool["model"] for pool in pools}) > 1
    for pool in pools:
        of = f"{escape(pool['model'])} " if several else ""
        up = sum(instance["up"] for instance in pool["instances"])
        title = f"{of}{pool['role']} {up}/{pool['size']}"
        for instance in pool["instances"]:
            table.add_row(title, escape(instance["instance_id"]), *_cells(instance))
            title = ""
    return table


def _cells(instance: Json) -> list[str]:
    if not instance["up"]:
        return ["[red]silent[/]"]
    state = "[yellow]drains[/]" if instance["draining"] else "[green]up[/]"
    if instance["problems"]:
        state = "[red]unwell[/]"
    numbers = ("open_requests", "running", "waiting")
    oldest = _ms(instance["waited_s"]) if instance["waiting"] else ""
    return [
        state,
        _kv(instance),
        *(str(instance[name]) for name in numbers),
        oldest,
        str(instance["steps"]),
    ]


def _kv(instance: Json) -> str:
    total = instance["blocks_total"] or 1
    used = instance["blocks_used"] / total
    cached = instance["stats"].get("blocks_cached", 0) / total
    full = round(used * _BAR)
    kept = min(_BAR - full, round(cached * _BAR))
    bar = f"{'█' * full}[dim]{'▒' * kept}[/]{'·' * (_BAR - full - kept)}"
    return f"{bar} {used:4.0%} {cached:4.0%}"


def _recent(requests: list[Json]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("last requests", no_wrap=True)
    for name in ("in", "out", "TTFT", "TPOT"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("ended", no_wrap=True)
    table.add_column("most of the TTFT", no_wrap=True)
    for request in requests:
        table.add_row(
            escape(request["request_id"][-_ID:]),
            *(str(request[name]) for name in ("prompt_tokens", "output_tokens")),
            _ms(request["ttft_s"]) if request["output_tokens"] else "",
            _ms(request["tpot_s"]) if request["output_tokens"] > 1 else "",
            escape(request["error"] or request["finish"]),
            _longest(request["ttft_spans"]),
        )
    return table


def _longest(spans: dict[str, float]) -> str:
    total = sum(spans.values())
    longest = sorted(spans.items(), key=lambda span: -span[1])[:_SPANS]
    return ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in longest if seconds > 0)
