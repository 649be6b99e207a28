"""What is to be started, decided from what is desired and what is there. Pure: no Ray, no clock.

    (absent) ──start──▶ STARTING ──ready──▶ READY
                          ▲   │               │
                          │   └─────lost──────┤
                          └─start, after a    ▼
                            pause ────────── LOST

Each start has a generation; news from an older one is dropped.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from baton.core.ids import InstanceId
from baton.core.topology import InstanceInfo, Membership, Role


class Phase(StrEnum):
    """Where an instance stands."""

    STARTING = "starting"
    READY = "ready"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class Desired:
    """An instance that should be there."""

    instance_id: InstanceId
    role: Role


@dataclass(frozen=True, slots=True)
class Observed:
    """What is known of an instance."""

    phase: Phase
    generation: int
    """How often it has been started, from 0."""
    since: float
    """When it entered its phase."""
    failures: int = 0
    """Losses in a row; being ready for `Backoff.forgive_s` ends the row."""
    info: InstanceInfo | None = None
    """Set while it is ready."""


@dataclass(frozen=True, slots=True)
class Backoff:
    """How long a lost instance rests before it is started again, in seconds."""

    first_s: float = 0.5
    """After the second loss in a row; the first is made good at once, each more doubles it."""
    cap_s: float = 30.0
    forgive_s: float = 30.0
    """A row of losses is forgotten once the instance has been ready for this long."""

    def pause_s(self, failures: int) -> float:
        """Return the pause after `failures` losses in a row."""
        if failures <= 1:
            return 0.0
        # The exponent is bounded, so that an instance lost a thousand times overflows no float.
        return float(min(self.cap_s, self.first_s * 2 ** min(failures - 2, 32)))


@dataclass(frozen=True, slots=True)
class Start:
    """Start this instance; every report of how it goes carries the generation."""

    desired: Desired
    generation: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do now, and when to ask again if nothing happens before."""

    starts: tuple[Start, ...]
    ask_again_at: float | None


Fleet = Mapping[InstanceId, Observed]


def reconcile(desired: tuple[Desired, ...], fleet: Fleet, now: float, backoff: Backoff) -> Plan:
    """Return what is missing and may be started now, in the order of `desired`."""
    starts: list[Start] = []
    later: list[float] = []
    for want in desired:
        seen = fleet.get(want.instance_id)
        if seen is None:
            starts.append(Start(want, 0))
        elif seen.phase is Phase.LOST:
            due = seen.since + backoff.pause_s(seen.failures)
            if due <= now:
                starts.append(Start(want, seen.generation + 1))
            else:
                later.append(due)
    return Plan(tuple(starts), min(later, default=None))


def begun(fleet: Fleet, start: Start, now: float) -> Fleet:
    """Return the fleet after `start` was carried out."""
    name = start.desired.instance_id
    seen = fleet.get(name)
    failures = seen.failures if seen else 0
    return {**fleet, name: Observed(Phase.STARTING, start.generation, now, failures)}


def became_ready(fleet: Fleet, start: Start, info: InstanceInfo, now: float) -> Fleet:
    """Return the fleet after the instance reported that it is ready."""
    seen = _current(fleet, start)
    if seen is None or seen.phase is not Phase.STARTING:
        return fleet
    ready = replace(seen, phase=Phase.READY, since=now, info=info)
    return {**fleet, start.desired.instance_id: ready}


def was_lost(fleet: Fleet, start: Start, now: float, backoff: Backoff) -> Fleet:
    """Return the fleet after the instance ended, or failed to start."""
    seen = _current(fleet, start)
    if seen is None or seen.phase is Phase.LOST:
        return fleet
    proven = seen.phase is Phase.READY and now - seen.since >= backoff.forgive_s
    failures = 1 if proven else seen.failures + 1
    lost = Observed(Phase.LOST, seen.generation, now, failures)
    return {**fleet, start.desired.instance_id: lost}


def membership_of(fleet: Fleet, version: int) -> Membership:
    """Return the membership that gateways should use: the instances that are ready."""
    ready = (fleet[name].info for name in sorted(fleet))
    return Membership(version, tuple(info for info in ready if info is not None))


def missing(desired: tuple[Desired, ...], fleet: Fleet) -> tuple[InstanceId, ...]:
    """Return the desired instances that are not ready."""
    names = (want.instance_id for want in desired)
    return tuple(n for n in names if n not in fleet or fleet[n].phase is not Phase.READY)


def _current(fleet: Fleet, start: Start) -> Observed | None:
    seen = fleet.get(start.desired.instance_id)
    return seen if seen is not None and seen.generation == start.generation else None
