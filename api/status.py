"""How everything is, as GET /v1/status tells it: pools, instances, load, and the last requests.

    {"version": "…", "membership_version": 3, "problems": ["…"],
     "models": [{"name": "demo", "aliases": ["…"], "open": 2, "waiting": 0, "problems": [], …}],
     "requests": {"open": 2, "waiting": 0, "prompt_tokens": 910, "output_tokens": 204},
     "last_minute": {"requests": 12, "ttft_s": {"p50": …, "p90": …, "p99": …}, "tpot_s": {…}},
     "pools": [{"model": "demo", "role": "decode", "instances": [{"instance_id": "d-0", …}]}],
     "recent": [{"request_id": "…", "ttft_s": …, "ttft_spans": {…}, "handovers": […], …}]}

`prompt_tokens` and `output_tokens` only grow: of all requests that were admitted, open ones too.
What is listed is bounded: at most `INSTANCES` instances of a pool, and `RECENT` requests, the last
one first, without the gaps between their tokens.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from typing import Any

from baton import __version__
from baton.api.decode_session import SessionStats
from baton.api.model_lane import LaneStats
from baton.core.lease import Report
from baton.core.served_model import FrontModel
from baton.core.topology import InstanceInfo, Membership, Role
from baton.core.trace import RequestTrace

RECENT = 64
"""Requests at most."""
INSTANCES = 1024
"""Of one pool, at most."""

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ModelView:
    """What a gateway knows of one model."""

    front: FrontModel
    membership: Membership
    """Its instances."""
    problems: Sequence[str]
    stats: LaneStats


@dataclass(frozen=True, slots=True)
class StatusView:
    """What a gateway knows of everything."""

    models: Sequence[ModelView]
    membership_version: int
    last_minute: Mapping[str, object]
    reports: Mapping[str, Report | None]
    """By instance: what each said last; None if it has not answered lately."""
    problems: Sequence[str]
    totals: Mapping[str, int]
    usable: Set[str]
    """Instances to which new requests may go."""
    clock_s: float
    """Monotonic: differences of totals over differences of it are rates."""
    uptime_s: float


def status_of(view: StatusView, recent: Sequence[RequestTrace]) -> Json:
    """Return the body of the answer."""
    return {
        "version": __version__,
        "models": [_model(model) for model in view.models],
        "clock_s": view.clock_s,
        "uptime_s": view.uptime_s,
        "membership_version": view.membership_version,
        "problems": list(view.problems),
        "requests": dict(view.totals),
        "last_minute": dict(view.last_minute),
        "pools": [
            _pool(view, model, role)
            for model in view.models
            for role in Role
            if model.membership.of(role)
        ],
        "recent": [_request(trace) for trace in recent[:RECENT]],
    }


def _model(model: ModelView) -> Json:
    stats = model.stats
    return {
        "name": model.front.name,
        "aliases": list(model.front.aliases),
        "open": stats.open_requests,
        "queued": stats.queued,
        "waiting": stats.waiting,
        "ttft_p90_s": stats.ttft_s,
        "tpot_p90_s": stats.tpot_s,
        "problems": list(model.problems),
    }


def _pool(view: StatusView, model: ModelView, role: Role) -> Json:
    sessions = {session.instance_id: session for session in model.stats.sessions}
    members = model.membership.of(role)
    rows = [
        _instance(i, view.reports.get(i.instance_id), sessions.get(i.instance_id))
        | {"usable": i.instance_id in view.usable}
        for i in members[:INSTANCES]
    ]
    name = model.front.name
    return {"model": name, "role": str(role), "size": len(members), "instances": rows}


def _instance(instance: InstanceInfo, report: Report | None, session: SessionStats | None) -> Json:
    row: Json = {
        "instance_id": instance.instance_id,
        "address": instance.address,
        # As text: JSON readers round numbers of 64 bits.
        "incarnation": str(instance.incarnation),
        "kv_tokens": instance.kv_tokens,
        "max_sequences": instance.max_sequences,
        "ranks": instance.ranks,
        "up": report is not None,
        "our_requests": None if session is None else session.open_requests,
    }
    if report is not None:
        row |= asdict(report)
    return row


def _request(trace: RequestTrace) -> Json:
    row = trace.as_dict()
    del row["itl_s"]
    return row
