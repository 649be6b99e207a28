"""Ids of spans, some of which are chosen before their span is made; needs OpenTelemetry."""

from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.trace import SpanContext, get_current_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

_PROPAGATOR = TraceContextTextMapPropagator()
_SAMPLED = 1


class ChosenIds(RandomIdGenerator):
    """Random ids, but for the next span if `choose` has said which it gets."""

    def __init__(self) -> None:
        self._chosen: SpanContext | None = None

    def choose(self, span: SpanContext) -> None:
        """Let the next span have these ids; that of its trace only if it has no parent."""
        self._chosen = span if span.is_valid else None

    def generate_trace_id(self) -> int:
        """See IdGenerator."""
        return super().generate_trace_id() if self._chosen is None else self._chosen.trace_id

    def generate_span_id(self) -> int:
        """See IdGenerator."""
        chosen, self._chosen = self._chosen, None
        return super().generate_span_id() if chosen is None else chosen.span_id


def span_of(traceparent: str) -> SpanContext:
    """Return the span that a traceparent names; one that is not valid if it names none."""
    context = _PROPAGATOR.extract({"traceparent": traceparent})
    return get_current_span(context).get_span_context()


def new_span(caller: str) -> str:
    """Return the traceparent of a new span in the trace of `caller`'s, or in one of its own."""
    ids, parent = RandomIdGenerator(), span_of(caller)
    trace_id, flags = ids.generate_trace_id(), _SAMPLED
    if parent.is_valid:
        trace_id, flags = parent.trace_id, int(parent.trace_flags)
    return f"00-{trace_id:032x}-{ids.generate_span_id():016x}-{flags:02x}"
