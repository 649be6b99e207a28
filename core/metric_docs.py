"""Writes docs/metrics.md and the Grafana dashboard, from the one list of metrics.

Run `python -m baton.core.metric_docs` after a change of metric_table.py; a test sees if nobody did.
"""

import json
from itertools import groupby
from pathlib import Path
from typing import Any

from baton.core import metric_table as table
from baton.core.metric_table import METRICS, Group, Metric
from baton.core.spans import SPAN_NAMES, DecodeSpans, TtftSpans

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "metrics.md"
DASHBOARD = ROOT / "deploy" / "grafana" / "baton.json"

_HEAD = """# Metrics

Made by `python -m baton.core.metric_docs` from core/metric_table.py; do not edit.

A gateway serves these at `/metrics`, in Prometheus' text format. Workers have no endpoint of their
own: each tells the gateway how it is with every renewal of its lease, about once a second, and the
gateway exports that as `baton_instance_…` with the labels `instance_id`, `role` and `model`. With
several gateways each exports all instances: take the `max` over gateways, as the dashboard does.
One that is no member any more has no series any more. What the controller counts they ask it for,
every few seconds, and export too: while it does not answer, `baton_controller_up` is 0 and the rest
of it is missing.

Times are in seconds. Labels are bounded: {values} values of each, {tenants} of `tenant` (as many as
were seen first; the rest is `{other}`), and {instances} instances.
The dashboard deploy/grafana/baton.json is made from the same list.
"""
_TAIL = """
## Spans of the time to first token

The label `span` of `baton_ttft_span_seconds`. For each request they add up to its TTFT; the header
`x-baton-timing: 1` puts them into the answer too (in the last event of a stream), under `baton`.
TTFT counts from the request's arrival to its first token in the gateway, without the time that the
client took to send the body.

| span | where | what |
|---|---|---|
"""
_DECODE_SIDE = {
    "prefill_queue": "prefill",
    "prefill_compute": "prefill",
    "prefill_offer": "prefill",
    "prefill_network": "between decode and prefill",
    "handshake": "between decode and prefill",
}
_SPAN_TEXTS = {
    "wake": "waiting for a decode instance, of which there was none",
    "tokenize": "checking the request, its chat template, and tokens from text",
    "gateway_queue": "from the valid request until it is sent to a decode instance",
    "lost": "at decode instances that were lost or left before the first token, and the search"
    " for others",
    "gateway_network": "to the decode instance and back: the gateway's wait, less what decode"
    " accounts for",
    "decide": "from the request's arrival until it is chosen where its prompt is computed",
    "failed_handovers": "attempts that failed, each until the next way was tried",
    "handshake": "connection, Open and Accepted, as far as prefill did not work meanwhile",
    "prefill_network": "to prefill and back, beside the handshake: decode's wait, less what"
    " prefill accounts for",
    "prefill_queue": "waiting for prefill's engine, or for KV that it reads from decode first",
    "prefill_compute": "from the first step with the prompt to the first token",
    "prefill_offer": "digesting and staging the last blocks before they are offered",
    "room": "waiting for room in decode's KV pool, after the last offer",
    "connect": "waiting for the transport's connection, after that",
    "transfer": "reading and verifying KV, as far as compute did not hide it",
    "local_queue": "waiting for decode's own engine, where it computes the prompt",
    "local_compute": "from decode's first step with the prompt to the first token",
    "admit": "from verified KV to the first token's being ready to be sent",
    "outbox": "until it leaves with the messages of its step",
}


def page() -> str:
    """Return docs/metrics.md."""
    bounds = {
        "values": table.LABEL_VALUES,
        "tenants": table.TENANTS,
        "instances": table.INSTANCES,
        "other": table.OTHER,
    }
    parts = [_HEAD.format(**bounds)]
    for group, metrics in groupby(METRICS, lambda metric: metric.group):
        parts.append(f"\n## {group}\n\n| name | kind | labels | what |\n|---|---|---|---|\n")
        parts += [_row(metric) for metric in metrics]
    parts.append(_TAIL)
    parts += [f"| `{name}` | {_where(name)} | {_SPAN_TEXTS[name]} |\n" for name in SPAN_NAMES]
    return "".join(parts)


def _row(metric: Metric) -> str:
    labels = ", ".join(f"`{label}`" for label in metric.labels)
    text = metric.text
    if metric.buckets:
        text += f". Buckets: {', '.join(f'{bound:g}' for bound in metric.buckets)}"
    return f"| `{metric.full_name}` | {metric.kind} | {labels} | {text} |\n"


def _where(span: str) -> str:
    if f"{span}_s" in TtftSpans.__dataclass_fields__:
        return "gateway" if span != "gateway_network" else "between gateway and decode"
    assert f"{span}_s" in DecodeSpans.__dataclass_fields__, span
    return _DECODE_SIDE.get(span, "decode")


def dashboard() -> dict[str, Any]:
    """Return the Grafana dashboard: a row for each group, a panel for each metric."""
    panels: list[dict[str, Any]] = []
    y = 0
    for group in Group:
        panels.append(_panel(len(panels), "row", group, {"x": 0, "y": y, "w": 24, "h": 1}))
        y += 1
        metrics = [metric for metric in METRICS if metric.group is group]
        for place, metric in enumerate(metrics):
            at = {"x": place % 3 * 8, "y": y + place // 3 * 8, "w": 8, "h": 8}
            panels.append(_graph(len(panels), metric, at))
        y += (len(metrics) + 2) // 3 * 8
    return {
        "title": "Baton",
        "uid": "baton",
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [{"name": "source", "type": "datasource", "query": "prometheus"}]},
        "panels": panels,
    }


def _panel(number: int, kind: str, title: str, at: dict[str, int]) -> dict[str, Any]:
    return {"id": number + 1, "type": kind, "title": title, "gridPos": at}


def _graph(number: int, metric: Metric, at: dict[str, int]) -> dict[str, Any]:
    targets = [
        {"refId": chr(ord("A") + place), "expr": expr, "legendFormat": legend}
        for place, (expr, legend) in enumerate(_queries(metric))
    ]
    stacked = {"stacking": {"mode": "normal"}, "fillOpacity": 40} if _is_stacked(metric) else {}
    return _panel(number, "timeseries", metric.text.partition(". ")[0], at) | {
        "description": metric.text,
        "datasource": {"type": "prometheus", "uid": "${source}"},
        "fieldConfig": {"defaults": {"unit": metric.unit, "min": 0, "custom": stacked}},
        "targets": targets,
    }


def _is_stacked(metric: Metric) -> bool:
    return metric in (table.TTFT_SPAN, table.KV_BLOCKS)


def _queries(metric: Metric) -> list[tuple[str, str]]:
    """Return expressions of PromQL, each with what its lines are called."""
    name, by = metric.full_name, ", ".join(metric.labels)
    legend = " ".join(f"{{{{{label}}}}}" for label in metric.labels)
    over = f" by ({by})" if by else ""
    if metric is table.TTFT_SPAN:  # stacked, the means of the spans are the mean TTFT
        mean = f"sum by (span) (rate({name}_sum[$__rate_interval]))"
        requests = f"sum(rate({table.TTFT.full_name}_count[$__rate_interval]))"
        return [(f"{mean} / scalar({requests})", legend)]
    if metric.kind == "histogram":
        per = (
            f"sum by ({', '.join(('le', *metric.labels))}) (rate({name}_bucket[$__rate_interval]))"
        )
        return [
            (f"histogram_quantile({q}, {per})", f"p{q * 100:g} {legend}".strip())
            for q in (0.5, 0.9, 0.99)
        ]
    if metric.group in (Group.INSTANCES, Group.CONTROL):  # every gateway exports all of them
        inner = f"rate({name}[$__rate_interval])" if metric.kind == "counter" else name
        return [(f"max{over} ({inner})", legend)]
    inner = f"rate({name}[$__rate_interval])" if metric.kind == "counter" else name
    return [(f"sum{over} ({inner})", legend or metric.name)]


def write() -> None:
    """Write both files."""
    PAGE.write_text(page())
    DASHBOARD.parent.mkdir(parents=True, exist_ok=True)
    DASHBOARD.write_text(json.dumps(dashboard(), indent=2) + "\n")


if __name__ == "__main__":
    write()
