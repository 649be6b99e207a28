"""Sends the spans of requests to an OpenTelemetry collector, by OTLP over gRPC.

Needs the extra `otel`. Off unless an endpoint is given: then nothing of OpenTelemetry is imported.
"""

from typing import TYPE_CHECKING

from baton.core.errors import InvalidConfig
from baton.core.span_tree import Node, tree
from baton.core.trace import RequestTrace

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace.export import SpanExporter

_NS = 1_000_000_000
_EXPORT_TIMEOUT_S = 5.0


class Tracing:
    """Exports in a thread of its own, with a bounded queue: a slow collector loses spans."""

    def __init__(self, exporter: "SpanExporter") -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        from baton.core.tracing_ids import ChosenIds

        self._ids = ChosenIds()
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": "baton"}),
            shutdown_on_exit=False,
            id_generator=self._ids,
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("baton")

    def begun(self, traceparent: str) -> str:
        """Return the span of a request whose caller told that one, for whoever works on it.

        Both are as W3C Trace Context writes them; empty or malformed: the caller told none.
        """
        from baton.core.tracing_ids import new_span

        return new_span(traceparent)

    def ended(self, trace: RequestTrace, at_ns: int) -> None:
        """Send the spans of a request that ended `at_ns`, in Unix time."""
        from opentelemetry.context import Context
        from opentelemetry.trace import NonRecordingSpan, set_span_in_context

        from baton.core.tracing_ids import span_of

        begin_ns = at_ns - round(trace.e2e_s * _NS)
        caller, parent = span_of(trace.traceparent), Context()
        if caller.is_valid:
            parent = set_span_in_context(NonRecordingSpan(caller), parent)
        self._ids.choose(span_of(trace.span))
        self._send(tree(trace), begin_ns, parent)

    def _send(self, node: Node, begin_ns: int, parent: "Context") -> None:
        from opentelemetry.trace import SpanKind, set_span_in_context

        start_ns = begin_ns + round(node.start_s * _NS)
        span = self._tracer.start_span(
            node.name,
            context=parent,
            kind=SpanKind.SERVER if node.name == "request" else SpanKind.INTERNAL,
            attributes=node.attributes,
            start_time=start_ns,
        )
        inside = set_span_in_context(span, parent)
        for child in node.children:
            self._send(child, begin_ns, inside)
        span.end(start_ns + round(node.seconds * _NS))

    def close(self) -> None:
        """Send what is left, and stop; blocks for some seconds if the collector is silent."""
        self._provider.shutdown()


def open_tracing(endpoint: str) -> Tracing | None:
    """Return what sends spans to `endpoint` (http://host:port), or None if that is empty.

    Raises InvalidConfig if OpenTelemetry is not installed.
    """
    if not endpoint:
        return None
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    except ImportError:
        allowed = "nothing, without OpenTelemetry: pip install 'baton-serve[otel]'"
        raise InvalidConfig("otlp_endpoint", endpoint, allowed) from None
    insecure = not endpoint.startswith("https://")
    return Tracing(OTLPSpanExporter(endpoint, insecure=insecure, timeout=_EXPORT_TIMEOUT_S))
