"""What is seen of a pool, put together of what its instances and gateways tell. Pure."""

from collections.abc import Iterable, Mapping, Sequence

from baton.cluster.autoscale import Signals
from baton.cluster.fleet import Phase
from baton.cluster.state import ControlState
from baton.cluster.status import GatewayInfo
from baton.core.ids import InstanceId
from baton.core.lease import Report
from baton.core.topology import Role


def signals_of(
    state: ControlState,
    pool: str,
    reports: Mapping[InstanceId, Report],
    gateways: Sequence[GatewayInfo],
) -> Signals | None:
    """Return how the work of a pool goes; None while its instances have not told.

    `reports` are those of instances that are ready, `gateways` may be those of any model. Who waits
    at a gateway counts for the pool that has no room, as if it waited at its instances. Times of
    whole requests are told to every pool of the model: what they are held against decides whose
    they are.
    """
    model, config = state.spec.pools()[pool]
    own = [g.models[model.name] for g in gateways if model.name in g.models]
    wanted = state.counts[pool]
    seen = [s for s in state.fleet.values() if s.desired.pool == pool]
    ready = {s.desired.instance_id for s in seen if s.phase is Phase.READY}
    told = [report for name, report in reports.items() if name in ready]
    if wanted == 0:
        held = sum(g.open_requests for g in own) if config.role is Role.PREFILL else 0
        return Signals(open_requests=held + sum(g.waiting for g in own))
    if len(told) < len(ready) or not ready:
        return None
    blocks = sum(report.blocks_total for report in told)
    part = Role.PREFILL if config.role is Role.PREFILL else Role.DECODE
    queues = [gateway.queue_s for gateway in own if gateway.queue_for is part]
    return Signals(
        open_requests=sum(report.open_requests for report in told),
        queue_s=max(*(report.waited_s for report in told), *queues, 0.0),
        ttft_s=_most(g.ttft_s for g in own),
        tpot_s=_most(g.tpot_s for g in own),
        kv_use=sum(report.blocks_used for report in told) / blocks if blocks else 0.0,
        coming=max(0, wanted - len(ready)),
    )


def _most(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)
