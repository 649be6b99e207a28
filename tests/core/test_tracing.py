import sys

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from baton.core.config import GatewayConfig
from baton.core.errors import InvalidConfig
from baton.core.trace import RequestTrace
from baton.core.tracing import Tracing, open_tracing

TRACE_ID, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def sent(traceparent: str) -> list[tuple[str, str | None]]:
    """Return the trace and the parent of each span that a request's end sends."""
    exporter = InMemorySpanExporter()
    tracing = Tracing(exporter)
    trace = RequestTrace("r", "d", 1, 1, "stop", e2e_s=2.0, traceparent=traceparent)
    tracing.ended(trace, at_ns=10_000_000_000)
    tracing.close()
    spans = exporter.get_finished_spans()
    assert all((s.start_time, s.end_time) == (8_000_000_000, 10_000_000_000) for s in spans)
    return [
        (f"{s.context.trace_id:032x}", f"{s.parent.span_id:016x}" if s.parent else None)
        for s in spans
    ]


def test_a_caller_that_records_is_the_parent():
    assert sent(f"00-{TRACE_ID}-{PARENT}-01") == [(TRACE_ID, PARENT)]


def test_a_caller_that_records_nothing_gets_nothing():
    assert sent(f"00-{TRACE_ID}-{PARENT}-00") == []


@pytest.mark.parametrize("traceparent", ["", "nonsense", f"00-{'0' * 32}-{PARENT}-01", "é" * 99])
def test_without_a_caller_a_request_is_a_trace_of_its_own(traceparent: str):
    [(trace_id, parent)] = sent(traceparent)
    assert trace_id != TRACE_ID
    assert parent is None


@pytest.mark.parametrize("caller", ["", f"00-{TRACE_ID}-{PARENT}-01"])
def test_the_span_that_workers_were_told_is_the_one_that_is_sent(caller: str):
    exporter = InMemorySpanExporter()
    tracing = Tracing(exporter)
    told = [tracing.begun(caller) for _ in range(2)]
    for span in told:
        trace = RequestTrace("r", "d", 1, 1, "stop", e2e_s=2.0, traceparent=caller, span=span)
        tracing.ended(trace, at_ns=10_000_000_000)
    tracing.close()
    spans = [s.context for s in exporter.get_finished_spans()]
    assert [f"00-{s.trace_id:032x}-{s.span_id:016x}-01" for s in spans] == told
    assert len({s.span_id for s in spans}) == 2
    assert ({s.trace_id for s in spans} == {int(TRACE_ID, 16)}) == bool(caller)


def test_it_is_off_unless_an_endpoint_is_given():
    assert open_tracing("") is None


def test_without_opentelemetry_an_endpoint_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.grpc.trace_exporter", None)
    with pytest.raises(InvalidConfig, match=r"otlp_endpoint.*baton-serve\[otel\]"):
        open_tracing("http://127.0.0.1:4317")


@pytest.mark.parametrize(
    "endpoint", ["127.0.0.1:4317", "ftp://host", "http://host/path", "http://"]
)
def test_an_endpoint_is_host_and_port(endpoint: str):
    with pytest.raises(InvalidConfig, match="otlp_endpoint"):
        GatewayConfig.checked(otlp_endpoint=endpoint)
