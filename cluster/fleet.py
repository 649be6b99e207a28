"""What is known of each instance, and how events change it. Pure: no Ray, no clock.

              ┌────────── start ─────────┐
    (absent) ─┴▶ STARTING ──ready──▶ READY ──drain──▶ DRAINING ──gone──▶ (absent)
                  ▲   │                │                   │
        start,    │   └─────lost───────┤                   └─ gone, after a flip ─▶ PLACED
      after a     │                    ▼                                              │
        pause     └───────────────── LOST            (another id, in the same place) ─┘ start

Each start has a generation; news from an older one is dropped.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from baton.core.ids import InstanceId
from baton.core.topology import InstanceInfo, Membership, Role


class Phase(StrEnum):
    """Where an instance stands."""

    PLACED = "placed"
    """It has a place, that of one that was flipped, and is to be started."""
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class Desired:
    """An instance that should be there."""

    instance_id: InstanceId
    role: Role
    pool: str
    revision: str
    """Names all that it is started with."""


@dataclass(frozen=True, slots=True)
class Observed:
    """What is known of an instance."""

    desired: Desired
    """What it was started as."""
    phase: Phase
    generation: int
    """How often it has been started, from 0; -1: never."""
    since: float
    """When it entered its phase."""
    failures: int = 0
    """Losses in a row; being ready for `Backoff.forgive_s` ends the row."""
    info: InstanceInfo | None = None
    """Set while it is ready, and while it drains: gateways must know it until it is empty."""
    becomes: Desired | None = None
    """What is to be started in its place once it has left."""
    unplaced: bool = False
    """It was lost because there was no room for it, so it keeps no place."""


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
    reason: str

    @property
    def instance_id(self) -> InstanceId:
        """Whom to start."""
        return self.desired.instance_id


@dataclass(frozen=True, slots=True)
class Drain:
    """Take no more requests, let those that are open end, and leave."""

    instance_id: InstanceId
    generation: int
    reason: str


@dataclass(frozen=True, slots=True)
class Flip:
    """Drain an instance, and start another, of another role, in its place."""

    instance_id: InstanceId
    generation: int
    becomes: Desired
    reason: str


@dataclass(frozen=True, slots=True)
class Stop:
    """End an instance that serves nobody: it is still starting, or lost."""

    instance_id: InstanceId
    generation: int
    reason: str


Action = Start | Drain | Flip | Stop
Fleet = Mapping[InstanceId, Observed]


def acted(fleet: Fleet, action: Action, now: float) -> Fleet:
    """Return the fleet after an action was begun."""
    if isinstance(action, Start):
        name = action.instance_id
        failures = fleet[name].failures if name in fleet else 0
        begun = Observed(action.desired, Phase.STARTING, action.generation, now, failures)
        return {**fleet, name: begun}
    seen = _current(fleet, action.instance_id, action.generation)
    if seen is None or seen.phase is Phase.DRAINING:
        return fleet
    becomes = action.becomes if isinstance(action, Flip) else None
    leaving = replace(seen, phase=Phase.DRAINING, since=now, becomes=becomes)
    return {**fleet, action.instance_id: leaving}


def was_drained(fleet: Fleet, name: InstanceId, generation: int) -> Fleet:
    """Return the fleet after the last request of an instance that drains has ended."""
    seen = _current(fleet, name, generation)
    if seen is None or seen.phase is not Phase.DRAINING:
        return fleet
    return {**fleet, name: replace(seen, info=None)}


def became_ready(
    fleet: Fleet, name: InstanceId, generation: int, info: InstanceInfo, now: float
) -> Fleet:
    """Return the fleet after the instance reported that it is ready."""
    seen = _current(fleet, name, generation)
    if seen is None or seen.phase is not Phase.STARTING:
        return fleet
    return {**fleet, name: replace(seen, phase=Phase.READY, since=now, info=info)}


def was_lost(
    fleet: Fleet,
    name: InstanceId,
    generation: int,
    now: float,
    rest: Backoff,
    *,
    unplaced: bool = False,
) -> Fleet:
    """Return the fleet after the instance ended, or failed to start.

    `unplaced`: there was no room for it.
    """
    seen = _current(fleet, name, generation)
    if seen is None or seen.phase is Phase.LOST:
        return fleet
    if seen.phase is Phase.DRAINING:
        return was_drained(fleet, name, generation)
    proven = seen.phase is Phase.READY and now - seen.since >= rest.forgive_s
    failures = 1 if proven else seen.failures + 1
    lost = Observed(seen.desired, Phase.LOST, seen.generation, now, failures, unplaced=unplaced)
    return {**fleet, name: lost}


def gone(fleet: Fleet, name: InstanceId, generation: int, now: float) -> Fleet:
    """Return the fleet after nothing is left of an instance that was to leave."""
    seen = _current(fleet, name, generation)
    if seen is None or seen.phase is not Phase.DRAINING:
        return fleet
    rest = {other: known for other, known in fleet.items() if other != name}
    if seen.becomes is not None:
        placed = Observed(seen.becomes, Phase.PLACED, -1, now)
        rest[seen.becomes.instance_id] = placed
    return rest


def membership_of(fleet: Fleet, version: int) -> Membership:
    """Return the membership that gateways should use: who is ready, or still has requests."""
    ready = (fleet[name].info for name in sorted(fleet))
    return Membership(version, tuple(info for info in ready if info is not None))


def _current(fleet: Fleet, name: InstanceId, generation: int) -> Observed | None:
    seen = fleet.get(name)
    return seen if seen is not None and seen.generation == generation else None
