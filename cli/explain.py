"""`baton explain`: why a request went where it did, and what came of it."""

import os
from typing import Any
from urllib.parse import quote

import httpx
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table

from baton.core.errors import InvalidRequest, Unavailable

_TIMEOUT_S = 10.0


def explain(url: str, request_id: str, console: Console) -> None:
    """Ask a gateway and print its answer; raises Unavailable, or InvalidRequest if it forgot."""
    console.print(shown(_asked(url, request_id)))


def _asked(url: str, request_id: str) -> dict[str, Any]:
    # trust_env: a proxy set for the internet has no part in a talk with one's own gateway.
    key = os.environ.get("BATON_API_KEY", "")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    path = f"/v1/requests/{quote(request_id, safe='')}/explain"
    try:
        with httpx.Client(base_url=url, timeout=_TIMEOUT_S, trust_env=False) as http:
            response = http.get(path, headers=headers)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise Unavailable(f"no gateway answers at {url}: {error}") from None
    if response.status_code == httpx.codes.NOT_FOUND:
        allowed = "the id of a request that the gateway at --url had lately; it keeps the last ones"
        raise InvalidRequest("REQUEST_ID", request_id, allowed)
    if response.status_code != httpx.codes.OK:
        raise Unavailable(f"the gateway at {url} answered {response.status_code}")
    answer: dict[str, Any] = response.json()
    return answer


def shown(told: dict[str, Any]) -> RenderableType:
    """Return what is printed."""
    parts: list[RenderableType] = [f"[bold]request {escape(told['request_id'])}[/bold]"]
    for number, decision in enumerate(told["decisions"]):
        if number:
            parts.append("\n[bold]moved[/bold]")
        parts += _decision(decision)
    return Group(*parts, *_measured(told))


def _decision(decision: dict[str, Any]) -> list[RenderableType]:
    chosen, blind = decision["chosen"], decision["blind_candidates"]
    pair = escape(chosen["decode"])
    if chosen["prefill"] is not None:
        pair = f"{escape(chosen['prefill'])} → {pair}"
    lines: list[RenderableType] = [
        f"{decision['prompt_tokens']} tokens, about {decision['expected_output_tokens']:.0f} to"
        f" come; membership {decision['membership_version']},"
        f" {decision['state_version']} events heard, {blind} instances silent",
        f"chosen: [bold]{pair}[/bold], by {escape(decision['decided'])}",
        f"predicted: TTFT {_ms(chosen['ttft_s'])}, TPOT {_ms(chosen['tpot_s'])}"
        f"; regret, as far as is known now: {_ms(decision['regret_s'])}",
        "",
        _table("decode", decision["decode"], decision["decode_candidates"], _DECODE),
    ]
    if decision["prefill"]:
        table = _table("prefill", decision["prefill"], decision["prefill_candidates"], _PREFILL)
        lines += ["", table]
    return lines


_PREFILL = {
    "cached": "cached_tokens",
    "queued": "queued_tokens",
    "takes": "prefill_s",
}
_DECODE = {
    "cached": "cached_tokens",
    "running": "running",
    "context": "context_tokens",
    "short": "short_tokens",
    "handover": "handover_s",
    "or here": "local_s",
    "TTFT": "ttft_s",
    "TPOT": "tpot_s",
    "all": "cost_s",
}


def _table(
    title: str, rows: list[dict[str, Any]], candidates: int, columns: dict[str, str]
) -> Table:
    """Return the candidates, best first; the first one was chosen."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(f"{title} ({len(rows)} of {candidates})", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        cells = (_cell(name, row[name]) for name in columns.values())
        table.add_row(escape(row["instance"]), *cells)
    return table


def _cell(name: str, value: float) -> str:
    return _ms(value) if name.endswith("_s") else str(value)


def _measured(told: dict[str, Any]) -> list[RenderableType]:
    measured = told["measured"]
    if measured is None:
        return ["\nit is still open"]
    where = f"{escape(measured['decode'])} alone"
    if measured["prefill"] is not None:
        where = f"{escape(measured['prefill'])} → {escape(measured['decode'])}"
    lines: list[RenderableType] = [
        f"\nmeasured: TTFT {_ms(measured['ttft_s'])}, TPOT {_ms(measured['tpot_s'])} on {where};"
        f" {measured['cached_tokens']} tokens were cached, {measured['output_tokens']} came,"
        f" {escape(measured['error'] or measured['finish'])}"
    ]
    if len(measured["attempts"]) > 1:
        lines.append(f"handovers: {escape(', '.join(measured['attempts']))}")
    return lines


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms"
