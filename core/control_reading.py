"""What the controller counts and tells the gateways, which export it: see metric_table.py."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class PoolReading:
    """One pool, now."""

    name: str
    role: str
    desired: int
    """Instances that are wanted."""
    ready: int
    """Instances that serve."""


@dataclass(frozen=True, slots=True)
class ControlReading:
    """Counted since this controller began: with another one they begin anew."""

    pools: tuple[PoolReading, ...] = ()
    actions: Mapping[str, int] = field(default_factory=dict)
    """What it has begun, by what: start, drain, flip, stop."""
    losses: int = 0
    """Lives of instances that ended by themselves."""
    recoveries: int = 0
    """Instances that were lost, and are ready again."""
    lease_flaps: int = 0
    """Leases that had lapsed and were taken up again by the same life of an instance."""
