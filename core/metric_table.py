"""Every metric that Baton exports: name, meaning, labels and buckets; see docs/metrics.md.

Time is in seconds. A label takes few values: those that name something from outside (a tenant, a
model, an error code, a transport) are capped, and the rest counts as `(other)`; instances are those
that are members now.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

Buckets = tuple[float, ...]

_FIRST_TOKEN = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_EACH_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2.5)
_WHOLE = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_TRANSFER = (0.0001, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1, 5)
_SPAN = (0.0001, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, 60)

LABEL_VALUES = 64
"""That a capped label takes at most."""
TENANTS = 256
"""That have metrics of their own: as many as were seen first."""
INSTANCES = 1024
"""Members that have metrics of their own."""
OTHER = "(other)"


class Group(StrEnum):
    """What a metric is about, in the order of the dashboard's rows."""

    REQUESTS = "Requests"
    LATENCY = "Latency"
    HANDOVER = "Handover"
    INSTANCES = "Instances"
    CONTROL = "Control plane"
    EDGE = "Edge and tenants"


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric as Prometheus sees it, but for the prefix `baton_`."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    group: Group
    text: str
    labels: tuple[str, ...] = ()
    buckets: Buckets = ()
    """Of a histogram: upper bounds."""
    unit: str = "short"
    """For the dashboard, in Grafana's words."""

    @property
    def full_name(self) -> str:
        """As it is scraped; a histogram's series end in _bucket, _sum and _count."""
        return f"baton_{self.name}"


def _counter(name: str, group: Group, text: str, *labels: str, unit: str = "short") -> Metric:
    return Metric(f"{name}_total", "counter", group, text, labels, unit=unit)


def _gauge(name: str, group: Group, text: str, *labels: str, unit: str = "short") -> Metric:
    return Metric(name, "gauge", group, text, labels, unit=unit)


def _histogram(name: str, group: Group, text: str, buckets: Buckets, *labels: str) -> Metric:
    return Metric(f"{name}_seconds", "histogram", group, text, labels, buckets, "s")


# Requests, as the gateway sees them

REQUESTS = _counter(
    "requests", Group.REQUESTS, "Requests by finish reason or error code", "outcome", "model"
)
OPEN = _gauge("open_requests", Group.REQUESTS, "Requests in the system now", "model")
GATEWAY_QUEUE = _gauge(
    "queued_requests",
    Group.REQUESTS,
    "Requests that wait at the gateway for room at instances",
    "model",
)
TURNED_AWAY = _counter(
    "refused_requests",
    Group.REQUESTS,
    "Requests refused with 429, by what there was too much of",
    "reason",
    "model",
)
WAITING = _gauge(
    "waiting_requests", Group.REQUESTS, "Requests that wait for a decode instance to come", "model"
)
PROMPT_TOKENS = _counter(
    "prompt_tokens", Group.REQUESTS, "Prompt tokens of admitted requests", "model"
)
CACHED_TOKENS = _counter(
    "cached_prompt_tokens",
    Group.REQUESTS,
    "Prompt tokens of ended requests found in a prefix cache",
    "model",
)
OUTPUT_TOKENS = _counter("output_tokens", Group.REQUESTS, "Tokens generated for users", "model")
LOCAL_PREFILLS = _counter(
    "local_prefills", Group.REQUESTS, "Prompts computed by the decode instance"
)
MIGRATIONS = _counter(
    "migrations",
    Group.REQUESTS,
    "Requests that went on on another decode instance, by why",
    "reason",
)

# Latency

TTFT = _histogram("ttft", Group.LATENCY, "Time to first token", _FIRST_TOKEN, "model")
TTFT_SPAN = _histogram(
    "ttft_span",
    Group.LATENCY,
    "Parts of the time to first token; per request they add up to it. What took no time is not"
    " counted: divide the sum by baton_ttft_seconds_count for a mean over all requests",
    _SPAN,
    "span",
)
QUEUE_WAIT = _histogram(
    "queue", Group.LATENCY, "Wait at the gateway of admitted requests", _FIRST_TOKEN, "model"
)
TPOT = _histogram("tpot", Group.LATENCY, "Mean time per later token", _EACH_TOKEN, "model")
ITL = _histogram("itl", Group.LATENCY, "Gap between messages with tokens", _EACH_TOKEN, "model")
E2E = _histogram("e2e", Group.LATENCY, "From arrival to the last token", _WHOLE, "model")

# Handovers, as decode instances tell of them

HANDOVERS = _counter("handovers", Group.HANDOVER, "Handover attempts by outcome", "outcome")
BYTES = _counter("handover_bytes", Group.HANDOVER, "KV bytes by transport", "transport", unit="Bps")
BLOCKS = _counter("handover_blocks", Group.HANDOVER, "KV blocks of prompts that were handed over")
BLOCKS_SAVED = _counter(
    "handover_blocks_saved",
    Group.HANDOVER,
    "Of these, found in decode's prefix cache: they did not travel",
)
TRANSFER = _histogram(
    "handover_transfer", Group.HANDOVER, "Time with reads under way", _TRANSFER, "transport"
)
EXPOSED = _histogram(
    "handover_exposed", Group.HANDOVER, "Transfer not hidden by compute", _TRANSFER, "transport"
)
PHASE = _histogram(
    "handover_phase",
    Group.HANDOVER,
    "Parts of handovers that went well; they overlap",
    _SPAN,
    "phase",
)
PHASES = ("handshake", "queue", "compute", "allocation_wait", "admission_wait")
"""Each is a field of core.trace.HandoverTrace, in seconds."""

# Instances, as they report to the gateway with each renewal of their lease

_OF = ("instance_id", "role", "model")
MEMBERSHIP = _gauge(
    "membership_version", Group.INSTANCES, "Version of the membership that the gateway goes by"
)
UP = _gauge("instance_up", Group.INSTANCES, "1 if it has answered lately and serves", *_OF)
DRAINING = _gauge("instance_draining", Group.INSTANCES, "1 if it is about to leave", *_OF)
PROBLEMS = _gauge("instance_problems", Group.INSTANCES, "Budgets that it has passed", *_OF)
INSTANCE_OPEN = _gauge(
    "instance_open_requests", Group.INSTANCES, "Requests, or handovers, that are open in it", *_OF
)
QUEUED = _gauge("instance_waiting", Group.INSTANCES, "Sequences that wait for its engine", *_OF)
OLDEST = _gauge(
    "instance_oldest_wait_seconds",
    Group.INSTANCES,
    "For how long at least the first of them has waited",
    *_OF,
    unit="s",
)
RUNNING = _gauge("instance_running", Group.INSTANCES, "Sequences that are computed", *_OF)
KV_BLOCKS = _gauge(
    "instance_kv_blocks",
    Group.INSTANCES,
    "KV blocks: held (used), kept for reuse (cached), held until a read has ended (fencing), free",
    *_OF,
    "state",
)
KV_STATES = ("used", "cached", "fencing", "free")


@dataclass(frozen=True, slots=True)
class InstanceCounter:
    """A counter that an instance keeps itself, and reports."""

    metric: Metric
    stats: tuple[str, ...]
    """Of a worker's `stats()`, those that it is the sum of."""


def _kept(name: str, text: str, *stats: str) -> InstanceCounter:
    metric = _counter(f"instance_{name}", Group.INSTANCES, text, *_OF)
    return InstanceCounter(metric, stats)


INSTANCE_COUNTERS = (
    _kept("steps", "Engine steps", "steps"),
    _kept("busy_seconds", "Time in engine steps", "busy_s"),
    _kept("prompt_tokens", "Prompt tokens that its engine took", "prompt_tokens"),
    _kept("cached_prompt_tokens", "Of these, found in its prefix cache", "prompt_tokens_cached"),
    _kept("preemptions", "Sequences that gave way to others", "preemptions"),
    _kept(
        "blocks_swapped",
        "KV blocks moved to host memory, or back",
        "blocks_swapped_out",
        "blocks_swapped_in",
    ),
    _kept("transfers_failed", "Reads of KV that failed", "transfers_failed"),
    _kept("transport_fallbacks", "Peers read by a slower transport", "transport_fallbacks"),
    _kept("reads_refused", "Reads of KV by others that it refused", "reads_refused"),
    _kept("wrong_kv", "Blocks of caches that failed verification", "pulls_wrong", "backups_wrong"),
    _kept("blocks_pulled", "KV blocks read from decode's cache", "blocks_pulled"),
    _kept("blocks_backed_up", "KV blocks that a peer has taken as backup", "backup_blocks_given"),
    _kept("tasks_crashed", "Tasks that ended by a bug", "tasks_crashed"),
)
REPORTED = tuple(
    sorted(
        {stat for counter in INSTANCE_COUNTERS for stat in counter.stats}
        | {f"blocks_{state}" for state in KV_STATES}
    )
)
"""Names of a worker's `stats()` that travel in its report."""

# The control plane, as the controller tells the gateways every few seconds

CONTROLLER_UP = _gauge(
    "controller_up", Group.CONTROL, "1 if the controller has answered the gateway lately"
)
POOL_DESIRED = _gauge(
    "pool_desired_instances", Group.CONTROL, "Instances that are wanted", "pool", "role"
)
POOL_READY = _gauge("pool_ready_instances", Group.CONTROL, "Instances that serve", "pool", "role")
ACTIONS = _counter(
    "controller_actions",
    Group.CONTROL,
    "What the controller has begun: starts, drains, flips and stops of instances",
    "action",
)
LOSSES = _counter("controller_losses", Group.CONTROL, "Instances that ended by themselves")
RECOVERIES = _counter(
    "controller_recoveries", Group.CONTROL, "Instances that were lost, and are ready again"
)
LEASE_FLAPS = _counter(
    "controller_lease_flaps",
    Group.CONTROL,
    "Leases of the controller that lapsed, and were taken up again by the same process",
)

# The edge

CUT = _counter(
    "connections_cut", Group.EDGE, "HTTP connections and gRPC calls that were cut", "reason"
)
RELOAD_FAILURES = _counter(
    "reload_failures", Group.EDGE, "Changed files that were not taken over", "file"
)
TENANT_REQUESTS = _counter("tenant_requests", Group.EDGE, "Ended requests by tenant", "tenant")
TENANT_TOKENS = _counter(
    "tenant_tokens", Group.EDGE, "Tokens of ended requests by tenant", "tenant", "kind"
)

METRICS: tuple[Metric, ...] = (
    *(
        REQUESTS,
        OPEN,
        GATEWAY_QUEUE,
        TURNED_AWAY,
        WAITING,
        PROMPT_TOKENS,
        CACHED_TOKENS,
        OUTPUT_TOKENS,
    ),
    *(LOCAL_PREFILLS, MIGRATIONS),
    *(TTFT, TTFT_SPAN, QUEUE_WAIT, TPOT, ITL, E2E),
    *(HANDOVERS, BYTES, BLOCKS, BLOCKS_SAVED, TRANSFER, EXPOSED, PHASE),
    *(MEMBERSHIP, UP, DRAINING, PROBLEMS, INSTANCE_OPEN, QUEUED, OLDEST, RUNNING, KV_BLOCKS),
    *(counter.metric for counter in INSTANCE_COUNTERS),
    *(CONTROLLER_UP, POOL_DESIRED, POOL_READY, ACTIONS, LOSSES, RECOVERIES, LEASE_FLAPS),
    *(CUT, RELOAD_FAILURES, TENANT_REQUESTS, TENANT_TOKENS),
)
"""All, in the order of the documentation."""
