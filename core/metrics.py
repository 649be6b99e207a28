"""What a gateway measures, for Prometheus; there is no global registry."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from baton.core.trace import HandoverTrace, RequestTrace

_FIRST_TOKEN = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_EACH_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2.5)
_WHOLE = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_TRANSFER = (0.0001, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1, 5)

_TENANTS = 256
"""That have metrics of their own: as many as were seen first."""

CONTENT_TYPE = CONTENT_TYPE_LATEST
"""Of what `render` returns."""


class GatewayMetrics:
    """The gateway's metrics; times are in seconds."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        """`registry` is where they are kept; by default one of their own."""
        registry = registry or CollectorRegistry()
        self._registry = registry

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"baton_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"baton_{name}", text, labels, registry=registry, buckets=buckets)

        self._requests = counter(
            "requests_total", "Requests by finish reason or error code", "outcome"
        )
        self._open = Gauge("baton_open_requests", "Requests in the system now", registry=registry)
        self._tokens_in = counter("prompt_tokens_total", "Prompt tokens of admitted requests")
        self._cached = counter(
            "cached_prompt_tokens_total", "Prompt tokens of ended requests found in a prefix cache"
        )
        self._tokens_out = counter("output_tokens_total", "Tokens generated for users")
        self._ttft = histogram("ttft_seconds", "Time to first token", _FIRST_TOKEN)
        self._tpot = histogram("tpot_seconds", "Mean time per later token", _EACH_TOKEN)
        self._itl = histogram("itl_seconds", "Gap between messages with tokens", _EACH_TOKEN)
        self._e2e = histogram("e2e_seconds", "From arrival to the last token", _WHOLE)
        self._handovers = counter("handovers_total", "Handover attempts by outcome", "outcome")
        self._bytes = counter("handover_bytes_total", "KV bytes by transport", "transport")
        self._transfer = histogram(
            "handover_transfer_seconds", "Time with reads under way", _TRANSFER, "transport"
        )
        self._exposed = histogram(
            "handover_exposed_seconds", "Transfer not hidden by compute", _TRANSFER, "transport"
        )
        self._migrations = counter(
            "migrations_total", "Requests that went on on another decode instance, by why", "reason"
        )
        self._local = counter("local_prefills_total", "Prompts computed by the decode instance")
        self._cut = counter("connections_cut_total", "HTTP connections that were cut", "reason")
        self._reload_failures = counter(
            "reload_failures_total", "Changed files that were not taken over", "file"
        )
        self._tenant_requests = counter(
            "tenant_requests_total", "Ended requests by tenant", "tenant"
        )
        self._tenant_tokens = counter(
            "tenant_tokens_total", "Tokens of ended requests by tenant", "tenant", "kind"
        )
        self._tenants: set[str] = set()

    def opened(self, prompt_tokens: int) -> None:
        """Count an admitted request."""
        self._open.inc()
        self._tokens_in.inc(prompt_tokens)

    def refused(self, code: str) -> None:
        """Count a request that was not admitted."""
        self._requests.labels(code).inc()

    def cut(self, reason: str) -> None:
        """Count a connection that was cut because of what its client did, or did not."""
        self._cut.labels(reason).inc()

    def reload_failed(self, file: str) -> None:
        """Count a changed file that was not taken over."""
        self._reload_failures.labels(file).inc()

    def closed(self, trace: RequestTrace) -> None:
        """Count an admitted request that has ended."""
        self._open.dec()
        self._requests.labels(trace.error or trace.finish).inc()
        self._tokens_out.inc(trace.output_tokens)
        self._cached.inc(trace.cached_tokens)
        self._e2e.observe(trace.e2e_s)
        if trace.output_tokens > 0:
            self._ttft.observe(trace.ttft_s)
        if trace.output_tokens > 1:
            self._tpot.observe(trace.tpot_s)
        self._closed_for(self._tenant_label(trace.tenant), trace)
        for gap in trace.itl_s:
            self._itl.observe(gap)
        if trace.local_prefill:
            self._local.inc()
        for migration in trace.migrations:
            self._migrations.labels(migration.error).inc()
        for handover in trace.handovers:
            self._handed_over(handover)

    def _closed_for(self, tenant: str, trace: RequestTrace) -> None:
        self._tenant_requests.labels(tenant).inc()
        self._tenant_tokens.labels(tenant, "prompt").inc(trace.prompt_tokens)
        self._tenant_tokens.labels(tenant, "output").inc(trace.output_tokens)

    def _tenant_label(self, tenant: str) -> str:
        """Return the tenant's name, or `(other)` once there are too many of them."""
        if len(self._tenants) < _TENANTS:
            self._tenants.add(tenant)
        return tenant if tenant in self._tenants else "(other)"

    def _handed_over(self, trace: HandoverTrace) -> None:
        self._handovers.labels(trace.outcome).inc()
        if trace.transport:
            self._bytes.labels(trace.transport).inc(trace.bytes)
            self._transfer.labels(trace.transport).observe(trace.transfer_s)
            self._exposed.labels(trace.transport).observe(trace.exposed_s)

    def render(self) -> bytes:
        """Return everything in the registry in Prometheus' text format."""
        return generate_latest(self._registry)
