"""What a gateway measures, for Prometheus; there is no global registry. See metric_table.py."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from baton.core import metric_table as table
from baton.core.control_reading import ControlReading
from baton.core.lease import Report
from baton.core.metric_table import Metric
from baton.core.trace import HandoverTrace, RequestTrace

Kept = Counter | Gauge | Histogram

CONTENT_TYPE = CONTENT_TYPE_LATEST
"""Of what `render` returns."""


@dataclass(frozen=True, slots=True)
class InstanceReading:
    """One member, as the gateway knows it."""

    instance_id: str
    role: str
    model: str
    report: Report | None
    """Its last; None if it has not answered lately."""


@dataclass(frozen=True, slots=True)
class GatewayReading:
    """What is read when somebody asks, and not counted as it happens."""

    waiting: Mapping[str, int]
    """By model."""
    membership_version: int
    instances: tuple[InstanceReading, ...]


class GatewayMetrics:
    """The gateway's metrics; times are in seconds."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        """`registry` is where they are kept; by default one of their own."""
        self._registry = registry or CollectorRegistry()
        self._kept = {m.name: self._new(m) for m in table.METRICS if m not in _READ}
        self._found: dict[tuple[str, ...], Kept] = {}
        """Series by metric and values of labels; as many as there are."""
        self._seen: dict[str, set[str]] = {}
        """Values of labels, by label: they are capped."""
        self._tokens = {"prompt_tokens": 0, "output_tokens": 0}

    def _new(self, metric: Metric) -> Kept:
        name, text, labels, registry = metric.full_name, metric.text, metric.labels, self._registry
        if metric.kind == "histogram":
            return Histogram(name, text, labels, registry=registry, buckets=metric.buckets)
        kind = Counter if metric.kind == "counter" else Gauge
        return kind(name, text, labels, registry=registry)

    def watch(self, read: Callable[[], GatewayReading]) -> None:
        """From now on read the members, and what waits, whenever somebody scrapes."""
        self._registry.register(_Reader(read))

    def watch_control(self, read: Callable[[], ControlReading | None]) -> None:
        """From now on read what the controller told, whenever somebody scrapes; None: nothing."""
        self._registry.register(_ControlReader(read))

    def expect(self, model: str) -> None:
        """Begin the series of a model at 0, so that rates know of its first request too."""
        for metric in table.METRICS:
            if metric.labels == ("model",) and metric not in _READ:
                self._series(metric, (model,))

    def opened(self, model: str, prompt_tokens: int, waited_s: float) -> None:
        """Count an admitted request that waited for so long at the gateway."""
        self._gauge(table.OPEN, model).inc()
        self._observe(table.QUEUE_WAIT, waited_s, model)
        self._count(table.PROMPT_TOKENS, prompt_tokens, model)
        self._tokens["prompt_tokens"] += prompt_tokens

    def refused(self, code: str, model: str = "") -> None:
        """Count a request that was not admitted; "" if it named no model that is served."""
        self._count(table.REQUESTS, 1, code, model)

    def queued(self, requests: int, model: str) -> None:
        """Take how many requests wait at the gateway for a model."""
        self._gauge(table.GATEWAY_QUEUE, model).set(requests)

    def turned_away(self, reason: str, model: str) -> None:
        """Count a request that was refused; `reason` is that of its Overloaded."""
        self._count(table.TURNED_AWAY, 1, reason, model)

    def cut(self, reason: str) -> None:
        """Count a connection that was cut because of what its client did, or did not."""
        self._count(table.CUT, 1, reason)

    def reload_failed(self, file: str) -> None:
        """Count a changed file that was not taken over."""
        self._count(table.RELOAD_FAILURES, 1, file)

    def closed(self, trace: RequestTrace) -> None:
        """Count an admitted request that has ended."""
        model = trace.model
        self._gauge(table.OPEN, model).dec()
        self._count(table.REQUESTS, 1, trace.error or trace.finish, model)
        self._count(table.OUTPUT_TOKENS, trace.output_tokens, model)
        self._tokens["output_tokens"] += trace.output_tokens
        self._count(table.CACHED_TOKENS, trace.cached_tokens, model)
        self._closed_for(trace)
        self._times(trace)
        if trace.local_prefill:
            self._count(table.LOCAL_PREFILLS, 1)
        for migration in trace.migrations:
            self._count(table.MIGRATIONS, 1, migration.error)
        for handover in trace.handovers:
            self._handed_over(handover)

    def _closed_for(self, trace: RequestTrace) -> None:
        self._count(table.TENANT_REQUESTS, 1, trace.tenant)
        self._count(table.TENANT_TOKENS, trace.prompt_tokens, trace.tenant, "prompt")
        self._count(table.TENANT_TOKENS, trace.output_tokens, trace.tenant, "output")

    def _times(self, trace: RequestTrace) -> None:
        model = trace.model
        self._observe(table.E2E, trace.e2e_s, model)
        if trace.output_tokens > 0:
            self._observe(table.TTFT, trace.ttft_s, model)
            for name, seconds in trace.ttft_spans.items():
                if seconds > 0:
                    self._observe(table.TTFT_SPAN, seconds, name)
        if trace.output_tokens > 1:
            self._observe(table.TPOT, trace.tpot_s, model)
        for gap in trace.itl_s:
            self._observe(table.ITL, gap, model)

    def _handed_over(self, trace: HandoverTrace) -> None:
        self._count(table.HANDOVERS, 1, trace.outcome)
        self._count(table.BLOCKS, trace.blocks)
        self._count(table.BLOCKS_SAVED, trace.blocks_saved)
        if trace.transport:
            self._count(table.BYTES, trace.bytes, trace.transport)
            self._observe(table.TRANSFER, trace.transfer_s, trace.transport)
            self._observe(table.EXPOSED, trace.exposed_s, trace.transport)
        if trace.outcome == "ok":
            for phase in table.PHASES:
                self._observe(table.PHASE, getattr(trace, f"{phase}_s"), phase)

    def _gauge(self, metric: Metric, *values: str) -> Gauge:
        gauge = self._series(metric, values)
        assert isinstance(gauge, Gauge), metric
        return gauge

    def _count(self, metric: Metric, amount: float, *values: str) -> None:
        counter = self._series(metric, values)
        assert isinstance(counter, Counter), metric
        counter.inc(amount)

    def _observe(self, metric: Metric, seconds: float, *values: str) -> None:
        histogram = self._series(metric, values)
        assert isinstance(histogram, Histogram), metric
        histogram.observe(seconds)

    def _series(self, metric: Metric, values: tuple[str, ...]) -> Kept:
        """Return one metric with these values of its labels; `labels` takes long to find it."""
        if not values:
            return self._kept[metric.name]
        key = (metric.name, *values)
        found = self._found.get(key)
        if found is None:
            capped = self._capped(metric, values)
            found = self._kept[metric.name].labels(*capped)
            if table.OTHER not in capped:  # of those there is no end
                self._found[key] = found
        return found

    def _capped(self, metric: Metric, values: tuple[str, ...]) -> list[str]:
        """Return the labels' values, or `(other)` for one that came after too many others."""
        capped = []
        for label, value in zip(metric.labels, values, strict=True):
            seen = self._seen.setdefault(label, set())
            if len(seen) < (table.TENANTS if label == "tenant" else table.LABEL_VALUES):
                seen.add(value)
            capped.append(value if value in seen else table.OTHER)
        return capped

    def totals(self) -> dict[str, int]:
        """Return how many tokens came in and went out since the gateway began."""
        return dict(self._tokens)

    def render(self) -> bytes:
        """Return everything in the registry in Prometheus' text format."""
        return generate_latest(self._registry)


Row = tuple[list[str], float]
"""Values of the labels, and the value."""
_INSTANCE_GAUGES: Mapping[Metric, Callable[[Report], float]] = {
    table.DRAINING: lambda report: float(report.draining),
    table.PROBLEMS: lambda report: float(len(report.problems)),
    table.INSTANCE_OPEN: lambda report: float(report.open_requests),
    table.QUEUED: lambda report: float(report.waiting),
    table.OLDEST: lambda report: report.waited_s,
    table.RUNNING: lambda report: float(report.running),
}
_READ = {
    table.WAITING,
    table.MEMBERSHIP,
    table.UP,
    table.KV_BLOCKS,
    *_INSTANCE_GAUGES,
    *(counter.metric for counter in table.INSTANCE_COUNTERS),
    *(metric for metric in table.METRICS if metric.group is table.Group.CONTROL),
}
"""Metrics that are read when somebody scrapes."""


class _Reader(Collector):
    def __init__(self, read: Callable[[], GatewayReading]) -> None:
        self._read = read

    def collect(self) -> Iterator[Family]:
        """Yield what is so now: an instance that is a member no more has no series any more."""
        now = self._read()
        waiting = islice(now.waiting.items(), table.LABEL_VALUES)
        yield _family(table.WAITING, [([model], requests) for model, requests in waiting])
        yield _family(table.MEMBERSHIP, [([], now.membership_version)])
        members = now.instances[: table.INSTANCES]
        yield _family(table.UP, [(_of(m), float(m.report is not None)) for m in members])
        reports = [(_of(m), m.report) for m in members if m.report is not None]
        for metric, value in _INSTANCE_GAUGES.items():
            yield _family(metric, [(of, value(report)) for of, report in reports])
        yield _family(table.KV_BLOCKS, _kv_blocks(reports))
        for counter in table.INSTANCE_COUNTERS:
            yield _family(
                counter.metric,
                [(of, sum(r.stats.get(s, 0.0) for s in counter.stats)) for of, r in reports],
            )


class _ControlReader(Collector):
    def __init__(self, read: Callable[[], ControlReading | None]) -> None:
        self._read = read

    def collect(self) -> Iterator[Family]:
        """Yield what the controller told last; if it is silent, that alone."""
        told = self._read()
        yield _family(table.CONTROLLER_UP, [([], float(told is not None))])
        if told is None:
            return
        pools = [([pool.name, pool.role], pool) for pool in told.pools[: table.LABEL_VALUES]]
        yield _family(table.POOL_DESIRED, [(of, pool.desired) for of, pool in pools])
        yield _family(table.POOL_READY, [(of, pool.ready) for of, pool in pools])
        yield _family(table.ACTIONS, [([what], n) for what, n in told.actions.items()])
        yield _family(table.LOSSES, [([], told.losses)])
        yield _family(table.RECOVERIES, [([], told.recoveries)])
        yield _family(table.LEASE_FLAPS, [([], told.lease_flaps)])


def _of(member: InstanceReading) -> list[str]:
    return [member.instance_id, member.role, member.model]


def _kv_blocks(reports: Iterable[tuple[list[str], Report]]) -> list[Row]:
    return [
        ([*of, state], report.stats.get(f"blocks_{state}", 0.0))
        for of, report in reports
        for state in table.KV_STATES
    ]


def _family(metric: Metric, rows: Iterable[Row]) -> Family:
    family: CounterMetricFamily | GaugeMetricFamily
    if metric.kind == "counter":
        family = CounterMetricFamily(metric.full_name, metric.text, labels=metric.labels)
    else:
        family = GaugeMetricFamily(metric.full_name, metric.text, labels=metric.labels)
    for labels, value in rows:
        family.add_metric(labels, value)
    return family
