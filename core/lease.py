"""Whether an instance may serve: it holds a lease for as long as somebody renews it.

              first beat                    the last grant runs out, is withdrawn,
    FREE ───────────────────▶ HELD ───────────────────────────────▶ FENCED
      ▲                       │  ▲                                    │
      └───────────────────────┘  └────────────────────────────────────┘
        all have said goodbye         a beat of no older epoch, and progress

A *granter* is the controller or a gateway. Any of them suffices: instances serve on while the
controller is away, and one that reaches nobody fences itself. An instance that no granter has ever
spoken to is free: a worker that is started by hand, or by a test. See docs/decisions/0020.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class Standing(StrEnum):
    """What the lease allows."""

    FREE = "free"
    HELD = "held"
    FENCED = "fenced"


@dataclass(frozen=True, slots=True)
class Beat:
    """A granter's word: serve for another `lease_s` seconds."""

    granter: str
    """Its name and incarnation."""
    epoch: int
    """The version of the membership that it goes by."""
    lease_s: float
    controls: bool = False
    """It is the controller, of which there is one at a time: a lower epoch is an old one's."""


class Leave(StrEnum):
    """How a granter goes."""

    GOODBYE = "goodbye"
    """In good order: nothing of its is open."""
    WITHDRAW = "withdraw"
    """The instance is no member any more."""
    REVOKE = "revoke"
    """Another incarnation has the instance's place."""


@dataclass(frozen=True, slots=True)
class Report:
    """How an instance is; its answer to a beat."""

    standing: Standing
    epoch: int = 0
    """The highest that it has heard of."""
    draining: bool = False
    problems: tuple[str, ...] = ()
    """What is beyond its budget, in words; none: healthy."""
    steps: int = 0
    """Steps that its engine has ended since it began."""
    waiting: int = 0
    """Sequences that wait for the engine."""
    waited_s: float = 0.0
    """For how long at least the one that came first among them has."""
    running: int = 0
    """Sequences that are computed."""
    open_requests: int = 0
    """Requests, or handovers, that are open."""
    blocks_used: int = 0
    """KV blocks that somebody holds."""
    blocks_total: int = 0
    stats: Mapping[str, float] = field(default_factory=dict)
    """What else is measured, by name: see core.metric_table.REPORTED."""


class Progress:
    """Whether the model moves while it has work; on a clock passed in."""

    def __init__(self, stall_s: float) -> None:
        """`stall_s` is how long one step may take, and with it no step end."""
        self._stall_s = stall_s
        self._steps = -1
        self._since = 0.0

    def seen(self, steps: int, *, busy: bool, now: float) -> bool:
        """Take the number of steps that have ended; return whether the model is not stuck."""
        if steps != self._steps or not busy:
            self._steps, self._since = steps, now
        return now - self._since <= self._stall_s


class Lease:
    """The grants of one instance; events in, standing out. The caller brings the clock."""

    def __init__(self) -> None:
        self.epoch = 0
        """The highest that a granter has named."""
        self._controlled = 0
        """The highest that a controller has named."""
        self._grants: dict[str, float] = {}
        """When each runs out."""
        self._known = False
        self._revoked = False
        self._withdrawn = 0
        """The epoch in which the controller took it off the list: older ones still list it."""

    def __repr__(self) -> str:
        return f"Lease(epoch={self.epoch}, grants={self._grants}, revoked={self._revoked})"

    def beat(self, beat: Beat, now: float) -> bool:
        """Take a grant; False if it counts for nothing.

        That is so after REVOKE, and for whoever goes by an old view: a controller whose epoch is
        lower than another's, or a gateway that has not heard yet that this is no member any more.
        """
        if self._revoked or beat.epoch < (self._controlled if beat.controls else self._withdrawn):
            return False
        self._known = True
        self.epoch = max(self.epoch, beat.epoch)
        if beat.controls:
            self._controlled = beat.epoch
        # Those that ran out are forgotten, so that gateways that come and go leave nothing.
        self._grants = {name: until for name, until in self._grants.items() if until > now}
        self._grants[beat.granter] = now + beat.lease_s
        return True

    def left(self, last: Beat, leave: Leave, now: float) -> None:
        """A granter goes; one whose stream just breaks does not, and its last grant runs out."""
        if last.controls and last.epoch < self._controlled:
            return
        if leave is Leave.REVOKE:
            self._revoked = True
        elif leave is Leave.WITHDRAW:
            if last.controls:
                self._withdrawn = last.epoch
                self._grants.clear()
            self._grants.pop(last.granter, None)
        elif self.standing(now) is Standing.HELD:
            self._grants.pop(last.granter, None)
            self._known = any(until > now for until in self._grants.values())

    def standing(self, now: float) -> Standing:
        """Return what is allowed now."""
        if self._revoked:
            return Standing.FENCED
        if not self._known:
            return Standing.FREE
        return Standing.HELD if self._ends() > now else Standing.FENCED

    def ends_at(self) -> float | None:
        """Return when it runs out if nobody renews it; None if it is not held."""
        return self._ends() if self._known and not self._revoked else None

    def granters(self, now: float) -> tuple[str, ...]:
        """Return those whose grants have not run out."""
        return tuple(sorted(name for name, until in self._grants.items() if until > now))

    def _ends(self) -> float:
        return max(self._grants.values(), default=0.0)
