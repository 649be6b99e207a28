"""All that the control plane must not forget, and what its users may ask of it. Pure.

A controller that starts afresh reads this: what was wanted, what was begun, and by which names the
processes of each instance are found.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from baton.cluster.fleet import Action, Desired, Fleet, Observed, Phase, Start, acted
from baton.cluster.plan import Wish
from baton.cluster.spec import revision_of
from baton.core.cluster_spec import ClusterSpec, PoolSpec
from baton.core.errors import BatonError, InvalidConfig, InvalidRequest
from baton.core.ids import Incarnation, InstanceId
from baton.core.topology import InstanceInfo, Role

_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Handles:
    """By which names Ray knows what belongs to an instance."""

    place: str
    """Its placement group; empty: none yet."""
    actors: str
    """Of its latest start: rank r is <actors>.<r>. Empty: it was not started yet."""
    ranks: int
    """How many that start has."""


@dataclass(frozen=True, slots=True)
class GatewayHandle:
    """By which name Ray knows a gateway, and what it was started with."""

    actor: str
    revision: str


@dataclass(frozen=True, slots=True)
class ControlState:
    """What is wanted, and what was begun."""

    spec: ClusterSpec
    counts: Mapping[str, int]
    """Instances wanted, by pool: the spec's, and what was asked for since."""
    leaving: Mapping[InstanceId, str] = field(default_factory=dict)
    """Instances told to leave, each to which pool its place goes, or empty."""
    fleet: Fleet = field(default_factory=dict)
    handles: Mapping[InstanceId, Handles] = field(default_factory=dict)
    gateways: Mapping[str, GatewayHandle] = field(default_factory=dict)
    serial: int = 0
    """How many names were given out."""
    epoch: int = 0
    """No membership of a higher version was ever told to anybody."""

    @classmethod
    def of(cls, spec: ClusterSpec) -> "ControlState":
        """Return the state at the very beginning."""
        return cls(spec, {name: pool.instances for name, (_, pool) in spec.pools().items()})

    def wishes(self) -> tuple[Wish, ...]:
        """Return what each pool should be."""
        return tuple(
            Wish(name, pool.role, self.counts[name], revision_of(self.spec, name), model.name)
            for name, (model, pool) in self.spec.pools().items()
        )

    def to_json(self) -> str:
        """Return it as text that `from_json` reads."""
        values = {
            "format": _FORMAT,
            "spec": self.spec.model_dump(mode="json"),
            "fleet": {name: asdict(seen) for name, seen in self.fleet.items()},
            "handles": {name: asdict(known) for name, known in self.handles.items()},
            "gateways": {name: asdict(known) for name, known in self.gateways.items()},
            **{name: getattr(self, name) for name in ("counts", "leaving", "serial", "epoch")},
        }
        return json.dumps(values)

    @classmethod
    def from_json(cls, text: str, now: float) -> "ControlState":
        """Read what `to_json` wrote, perhaps on a machine whose clock says something else.

        Raises InvalidConfig if another Baton wrote it, which nothing here can read.
        """
        try:
            values = json.loads(text)
            found = values.pop("format")
            if found == _FORMAT:
                return cls(**_parts(values, now))
        except (BatonError, ValueError, LookupError, TypeError, AttributeError) as error:
            found = f"broken ({type(error).__name__})"  # its text may have secrets
        allowed = f"{_FORMAT}: the Baton that wrote it can read it, and end what it runs"
        raise InvalidConfig("format of the cluster's state", found, allowed)


def _parts(values: dict[str, Any], now: float) -> dict[str, Any]:
    return {
        **values,
        "spec": ClusterSpec.checked(**values["spec"]),
        "fleet": {name: _observed(seen, now) for name, seen in values["fleet"].items()},
        "handles": {name: Handles(**known) for name, known in values["handles"].items()},
        "gateways": {name: GatewayHandle(**known) for name, known in values["gateways"].items()},
    }


def _observed(values: dict[str, Any], now: float) -> Observed:
    becomes, info = values["becomes"], values["info"]
    return Observed(
        desired=_desired(values["desired"]),
        phase=Phase(values["phase"]),
        generation=values["generation"],
        since=now,
        failures=values["failures"],
        info=_info(info) if info else None,
        becomes=_desired(becomes) if becomes else None,
        unplaced=values.get("unplaced", False),  # which earlier Batons did not write
    )


def _desired(values: dict[str, Any]) -> Desired:
    return Desired(**{**values, "role": Role(values["role"])})


def _info(values: dict[str, Any]) -> InstanceInfo:
    typed = {"role": Role(values["role"]), "incarnation": Incarnation(values["incarnation"])}
    return InstanceInfo(**{**values, **typed})


def begun(state: ControlState, actions: tuple[Action, ...], now: float) -> ControlState:
    """Return the state after actions were begun, each start with names of its own."""
    fleet, handles, serial = state.fleet, dict(state.handles), state.serial
    for action in actions:
        fleet = acted(fleet, action, now)
        if isinstance(action, Start):
            serial += 1
            name = f"{action.instance_id}.{serial}"
            known = handles.get(action.instance_id)
            place = known.place if known else ""
            ranks = state.spec.pools()[action.desired.pool][1].parallel.size
            handles[action.instance_id] = Handles(place or name, name, ranks)
    return replace(state, fleet=fleet, handles=handles, serial=serial)


def with_spec(state: ControlState, spec: ClusterSpec) -> ControlState:
    """Return the state for another spec; the secrets of models that stay are kept.

    What was scaled by hand is again as the spec says; what is scaled by its load stays as it is.
    Raises InvalidConfig if it would turn TLS on or off between processes that run.
    """
    if (spec.tls is None) != (state.spec.tls is None):
        now = "none" if state.spec.tls is None else "some"
        raise InvalidConfig("tls", spec.tls, f"{now}, as what runs has, until `baton down`")
    secrets = {m.name: m.handover.secret for m in state.spec.models}
    models = tuple(
        m.model_copy(update={"handover": m.handover.model_copy(update={"secret": known})})
        if (known := secrets.get(m.name)) and not m.handover.secret.get_secret_value()
        else m
        for m in spec.models
    )
    spec = spec.model_copy(update={"models": models}).with_secrets()
    counts = {name: _kept_count(state, name, pool) for name, (_, pool) in spec.pools().items()}
    return replace(state, spec=spec, counts=counts)


def _kept_count(state: ControlState, name: str, pool: PoolSpec) -> int:
    before = state.spec.pools().get(name)
    if pool.autoscale is None or before is None or before[1].autoscale is None:
        return pool.instances
    least, most = pool.bounds
    return min(max(state.counts[name], least), most)


def scaled(state: ControlState, pool: str, count: int) -> ControlState:
    """Return the state after `count` instances were asked for in a pool."""
    _check_count(state, pool, count, "instances")
    return replace(state, counts={**state.counts, pool: count})


def told_to_leave(state: ControlState, name: str) -> ControlState:
    """Return the state after an instance was told to leave; its pool is then one fewer."""
    seen = _present(state, name)
    pool = seen.desired.pool
    _check_count(state, pool, state.counts[pool] - 1, "instance")
    counts = {**state.counts, pool: state.counts[pool] - 1}
    return replace(state, counts=counts, leaving={**state.leaving, seen.desired.instance_id: ""})


def told_to_flip(state: ControlState, name: str) -> ControlState:
    """Return the state after an instance was told to give its place to the other role's pool."""
    leaves = told_to_leave(state, name)
    seen = _present(state, name)
    other = _other_pool(state, seen.desired)
    _check_count(state, other, state.counts[other] + 1, "instance")
    counts = {**leaves.counts, other: state.counts[other] + 1}
    leaving = {**state.leaving, seen.desired.instance_id: other}
    return replace(leaves, counts=counts, leaving=leaving)


def _present(state: ControlState, name: str) -> Observed:
    there = [n for n, s in state.fleet.items() if s.phase is not Phase.DRAINING]
    here = [
        n for n in there if n not in state.leaving and state.fleet[n].desired.pool in state.counts
    ]
    if name not in here:
        allowed = f"one of {', '.join(sorted(here))}" if here else "none: no instance is there"
        raise InvalidRequest("instance", name, allowed)
    return state.fleet[InstanceId(name)]


def _other_pool(state: ControlState, leaves: Desired) -> str:
    """Return the pool of the same model and the other role, whose instances fit the same place."""
    model, own = state.spec.pools()[leaves.pool]
    if leaves.role is Role.MIXED:
        raise InvalidRequest("instance", leaves.instance_id, "one that prefills or decodes")
    wanted = Role.DECODE if leaves.role is Role.PREFILL else Role.PREFILL
    for name, pool in model.pools.items():
        if pool.role is wanted and _place(pool) == _place(own):
            return name
    allowed = f"one whose model has a {wanted} pool with as many ranks and the same resources"
    raise InvalidRequest("instance", leaves.instance_id, allowed)


def _place(pool: PoolSpec) -> object:
    return pool.parallel.pp, pool.parallel.stage_size, pool.resources


def _check_count(state: ControlState, pool: str, count: int, field: str) -> None:
    """Refuse a size that a pool may not have, or with which nobody would decode."""
    pools = state.spec.pools()
    if pool not in pools:
        raise InvalidRequest("pool", pool, f"one of {', '.join(pools)}")
    model, found = pools[pool]
    least, most = found.bounds
    if not least <= count <= most:
        allowed = f"{least} to {most} in {pool}, as the spec says"
        raise InvalidRequest(field, count, allowed)
    if found.role is not Role.PREFILL and not any(
        other.autoscale or (count if name == pool else state.counts[name])
        for name, other in model.pools.items()
        if other.role is not Role.PREFILL
    ):
        raise InvalidRequest(field, count, f"1 or more in {pool}: nobody else decodes")
