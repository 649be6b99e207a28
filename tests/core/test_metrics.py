import json
import re

import pytest
from prometheus_client.parser import text_string_to_metric_families

from baton.core import metric_docs, metric_table
from baton.core.control_reading import ControlReading, PoolReading
from baton.core.lease import Report, Standing
from baton.core.metric_table import METRICS, OTHER, TENANTS
from baton.core.metrics import GatewayMetrics, GatewayReading, InstanceReading
from baton.core.spans import DecodeSpans, TtftSpans
from baton.core.trace import HandoverTrace, MigrationTrace, RequestTrace

SPANS = TtftSpans(tokenize_s=0.25, decode=DecodeSpans(local_compute_s=0.5))
TRACE = RequestTrace(
    "r",
    "decode-0",
    prompt_tokens=5,
    output_tokens=2,
    finish="stop",
    tenant="acme",
    model="m",
    local_prefill=True,
    handovers=(
        HandoverTrace("p", 0, "wrong_kv"),
        HandoverTrace("p", 1, "ok", blocks=4, blocks_saved=1, bytes=96, transport="shm"),
    ),
    migrations=(MigrationTrace("decode-1", "instance_lost", 0, 0.1),),
    ttft_s=0.75,
    ttft_spans=SPANS,
    tpot_s=0.01,
    e2e_s=1.0,
    itl_s=(0.01,),
)
STATS = {"steps": 7.0, "busy_s": 1.5, "blocks_free": 3.0, "pulls_wrong": 1.0, "backups_wrong": 2.0}
READING = GatewayReading(
    waiting={"m": 1},
    membership_version=9,
    instances=(
        InstanceReading("decode-0", "decode", "m", Report(Standing.HELD, running=2, stats=STATS)),
        InstanceReading("prefill-0", "prefill", "m", None),
    ),
)

CONTROL = ControlReading(
    pools=(PoolReading("decode", "decode", desired=3, ready=2),),
    actions={"start": 4, "drain": 1},
    losses=2,
    recoveries=1,
    lease_flaps=5,
)


def filled() -> GatewayMetrics:
    """Everything has happened once."""
    metrics = GatewayMetrics()
    metrics.watch(lambda: READING)
    metrics.watch_control(lambda: CONTROL)
    metrics.opened("m", TRACE.prompt_tokens, waited_s=0.1)
    metrics.queued(2, "m")
    metrics.turned_away("queue", "m")
    metrics.closed(TRACE)
    metrics.refused("overloaded")
    metrics.cut("slow_reader")
    metrics.reload_failed("api_keys")
    return metrics


def values(metrics: GatewayMetrics) -> dict[tuple[str, tuple[str, ...]], float]:
    """Return all samples by name and values of labels."""
    families = text_string_to_metric_families(metrics.render().decode())
    return {(s.name, tuple(s.labels.values())): s.value for f in families for s in f.samples}


def test_what_is_scraped_is_what_is_listed():
    families = text_string_to_metric_families(filled().render().decode())
    scraped = {
        f.name: (f.type, f.documentation) for f in families if not f.name.endswith("_created")
    }
    listed = {m.full_name.removesuffix("_total"): (m.kind, m.text) for m in METRICS}
    assert scraped == listed


def test_a_request_is_counted():
    found = values(filled())
    assert found["baton_open_requests", ("m",)] == 0
    assert found["baton_requests_total", ("m", "stop")] == 1
    assert found["baton_requests_total", ("", "overloaded")] == 1
    assert found["baton_ttft_seconds_sum", ("m",)] == 0.75
    assert found["baton_ttft_span_seconds_sum", ("tokenize",)] == 0.25
    assert found["baton_ttft_span_seconds_sum", ("local_compute",)] == 0.5
    assert ("baton_ttft_span_seconds_sum", ("wake",)) not in found
    assert found["baton_handovers_total", ("wrong_kv",)] == 1
    assert found["baton_handover_bytes_total", ("shm",)] == 96
    assert found["baton_handover_blocks_saved_total", ()] == 1
    assert found["baton_handover_phase_seconds_count", ("queue",)] == 1
    assert found["baton_migrations_total", ("instance_lost",)] == 1
    assert found["baton_tenant_tokens_total", ("output", "acme")] == 2
    assert filled().totals() == {"prompt_tokens": 5, "output_tokens": 2}


def test_instances_are_as_they_reported_last():
    found = values(filled())
    decode, prefill = ("decode-0", "m", "decode"), ("prefill-0", "m", "prefill")
    assert (found["baton_instance_up", decode], found["baton_instance_up", prefill]) == (1, 0)
    assert found["baton_instance_steps_total", decode] == 7
    assert found["baton_instance_wrong_kv_total", decode] == 3
    assert found["baton_instance_kv_blocks", (*decode, "free")] == 3
    assert ("baton_instance_steps_total", prefill) not in found
    assert found["baton_membership_version", ()] == 9


def test_the_control_plane_is_as_the_controller_told_last():
    found = values(filled())
    assert found["baton_controller_up", ()] == 1
    assert found["baton_pool_desired_instances", ("decode", "decode")] == 3
    assert found["baton_pool_ready_instances", ("decode", "decode")] == 2
    assert found["baton_controller_actions_total", ("start",)] == 4
    assert found["baton_controller_losses_total", ()] == 2
    assert found["baton_controller_recoveries_total", ()] == 1
    assert found["baton_controller_lease_flaps_total", ()] == 5


def test_a_controller_that_does_not_answer_tells_of_no_pools():
    metrics = GatewayMetrics()
    metrics.watch_control(lambda: None)
    found = values(metrics)
    assert found["baton_controller_up", ()] == 0
    assert not any(name.startswith("baton_pool_") for name, _ in found)


@pytest.mark.parametrize(
    ("field", "limit", "name", "other"),
    [
        ("tenant", TENANTS, "baton_tenant_requests_total", (OTHER,)),
        ("error", metric_table.LABEL_VALUES, "baton_requests_total", ("", OTHER)),
        ("model", metric_table.LABEL_VALUES, "baton_output_tokens_total", (OTHER,)),
    ],
)
def test_labels_are_capped(field: str, limit: int, name: str, other: tuple[str, ...]):
    metrics = GatewayMetrics()
    for number in range(limit + 10):
        trace = RequestTrace("r", "d", 1, 1, "stop", **{field: f"{field}-{number}"})  # type: ignore[arg-type]
        metrics.opened(trace.model, 1, waited_s=0.0)
        metrics.closed(trace)
    series = {labels: value for (n, labels), value in values(metrics).items() if n == name}
    assert len(series) == limit + 1
    assert series[other] == 10


def test_the_page_and_the_dashboard_are_fresh():
    """If not: python -m baton.core.metric_docs."""
    assert metric_docs.PAGE.read_text() == metric_docs.page()
    assert json.loads(metric_docs.DASHBOARD.read_text()) == metric_docs.dashboard()


def test_the_dashboard_asks_for_nothing_that_does_not_exist():
    there = {name for name, _ in values(filled())}
    panels = json.loads(metric_docs.DASHBOARD.read_text())["panels"]
    queries = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    asked = {name for query in queries for name in re.findall(r"baton_\w+", query)}
    assert asked
    assert asked <= there
    assert {m.full_name for m in METRICS if m.kind != "histogram"} <= asked


def test_panels_have_a_place_of_their_own():
    panels = json.loads(metric_docs.DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for at in (panel["gridPos"] for panel in panels)
        for x in range(at["x"], at["x"] + at["w"])
        for y in range(at["y"], at["y"] + at["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24
