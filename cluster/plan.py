"""What is to be done, decided from what is desired and what is there. Pure: no Ray, no clock.

A pool whose config changed is replaced one instance at a time: the new one first where there is
room for one more, and nobody else is about to take it; else one leaves, and the new one takes its
place. So it is too if Ray finds no room after all. Never are fewer ready than asked for, or one
fewer where there is no room; and the last of a pool leaves only while every other pool of its model
serves.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import count

from baton.cluster.fleet import (
    Action,
    Backoff,
    Desired,
    Drain,
    Fleet,
    Flip,
    Observed,
    Phase,
    Start,
    Stop,
)
from baton.core.ids import InstanceId
from baton.core.topology import Role


@dataclass(frozen=True, slots=True)
class Wish:
    """What a pool should be."""

    pool: str
    role: Role
    count: int
    revision: str
    model: str

    def instance(self, name: InstanceId) -> Desired:
        """Return one of its instances."""
        return Desired(name, self.role, self.pool, self.revision)


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do now, and when to ask again if nothing happens before."""

    actions: tuple[Action, ...]
    ask_again_at: float | None


@dataclass(frozen=True, slots=True)
class Situation:
    """All that a plan is made of."""

    wishes: tuple[Wish, ...]
    leaving: Mapping[InstanceId, str]
    """Instances that were told to leave; each to which pool its place goes, or empty. The counts
    of `wishes` are those after that."""
    fleet: Fleet
    room: frozenset[str]
    """Pools for which there is room for one more instance."""
    now: float


def asks_for_room(wishes: Iterable[Wish], fleet: Fleet) -> bool:
    """Return whether a plan may depend on where there is room: what is lost keeps its place."""
    seen = list(fleet.values())
    return any(
        sum(s.desired.pool == wish.pool for s in seen) != wish.count
        or any(s.desired.pool == wish.pool and s.desired.revision != wish.revision for s in seen)
        for wish in wishes
    )


def make_plan(situation: Situation, backoff: Backoff) -> Plan:
    """Return what may be done now; what was begun is then in the fleet (`fleet.acted`)."""
    planner = _Planner(situation, backoff)
    wished = {wish.pool for wish in situation.wishes}
    for name, pool in situation.leaving.items():
        if name in situation.fleet:
            planner.leave(situation.fleet[name], pool)
    for seen in situation.fleet.values():
        if seen.desired.pool not in wished:
            planner.end(seen, "its pool is not wanted any more")
    for wish in situation.wishes:
        planner.fill(wish)
    return Plan(tuple(planner.actions), min(planner.later, default=None))


class _Planner:
    """Collects actions; each instance gets one at most."""

    def __init__(self, situation: Situation, backoff: Backoff) -> None:
        self.actions: list[Action] = []
        self.later: list[float] = []
        self._situation = situation
        self._backoff = backoff
        self._fleet = situation.fleet
        self._handled: set[InstanceId] = set()
        self._names = set(situation.fleet)
        self._reserved: dict[str, int] = {}
        """How many instances of a pool will be started in the place of one that is leaving."""
        for seen in situation.fleet.values():
            if seen.becomes is not None:
                self._reserve(seen.becomes)

    def leave(self, seen: Observed, pool: str) -> None:
        """Let an instance go that was told to; its place to `pool`, if that is one."""
        wish = next((w for w in self._situation.wishes if w.pool == pool), None)
        if wish is None:
            self.end(seen, "it was told to leave")
        elif seen.phase is not Phase.DRAINING and seen.desired.instance_id not in self._handled:
            becomes = wish.instance(self._new_name(wish))
            reason = f"it was told to become {becomes.instance_id}"
            self._act(Flip(seen.desired.instance_id, seen.generation, becomes, reason))
            self._reserve(becomes)

    def end(self, seen: Observed, reason: str) -> None:
        """Let an instance go, unless it is about to."""
        name = seen.desired.instance_id
        if seen.phase is Phase.DRAINING or name in self._handled:
            return
        kind = Drain if seen.phase is Phase.READY else Stop
        self._act(kind(name, seen.generation, reason))

    def fill(self, wish: Wish) -> None:
        """Bring one pool nearer to what it should be."""
        pool = [s for s in self._fleet.values() if s.desired.pool == wish.pool]
        here = [s for s in pool if s.phase is not Phase.DRAINING and self._free(s)]
        here.sort(key=lambda s: _order(s.desired.instance_id))
        expected = len(here) + self._reserved.get(wish.pool, 0)
        old = [s for s in here if s.desired.revision != wish.revision and _runs(s)]
        if expected < wish.count:
            self._start_new(wish, wish.count - expected)
        elif old:
            self._replace(wish, here, old, expected)
        else:
            self._shrink(wish, here, expected - wish.count)
        for seen in here:
            if _runs(seen) or not self._free(seen):
                continue
            if seen.desired.revision == wish.revision:
                self._start_again(wish, seen)
            else:
                self.end(seen, "its config has changed, and its place may not be enough")

    def _shrink(self, wish: Wish, here: list[Observed], number: int) -> None:
        """Let `number` go: first those that serve nobody, then those that came last."""
        idle = [s for s in here if s.phase is not Phase.READY]
        ready = [s for s in here if s.phase is Phase.READY]
        for seen in [*reversed(idle), *reversed(ready)][:number]:
            self.end(seen, f"{wish.count} wanted in {wish.pool}")

    def _replace(
        self, wish: Wish, here: list[Observed], old: list[Observed], expected: int
    ) -> None:
        """Take one step of replacing `old`; `expected` is no less than what is wanted."""
        ready = sum(s.phase is Phase.READY for s in here)
        if idle := [s for s in old if s.phase is not Phase.READY]:
            for seen in idle:
                self.end(seen, "its config has changed before it was ready")
        elif self._draining(wish.pool):
            pass  # one at a time
        elif ready > wish.count:
            self.end(old[0], "its config has changed, and there is one ready to replace it")
        elif ready < wish.count:
            pass  # one at a time
        elif expected == wish.count and wish.pool in self._situation.room:
            if not self._anything_starting():  # it may be about to take that room
                self._start_new(wish, 1)
        elif expected > wish.count and not any(self._waits_for_room(wish, s) for s in here):
            pass  # the new one is on its way
        elif ready > 1 or self._others_serve(wish):
            self.end(old[0], "its config has changed, and there is no room for one more")

    def _waits_for_room(self, wish: Wish, seen: Observed) -> bool:
        """Return whether one was lost for want of room, which nobody who leaves will bring."""
        if not seen.unplaced or wish.pool in self._situation.room:
            return False
        return not self._anything_draining()

    def _others_serve(self, wish: Wish) -> bool:
        """Return whether each other pool of the model has one ready, which stays."""
        serving = {
            seen.desired.pool
            for seen in self._fleet.values()
            if seen.phase is Phase.READY and self._free(seen)
        }
        others = (w for w in self._situation.wishes if w.model == wish.model and w != wish)
        return all(other.pool in serving for other in others if other.count)

    def _start_new(self, wish: Wish, number: int) -> None:
        if wish.pool not in self._situation.room and self._anything_draining():
            return  # what is leaving makes room
        for _ in range(number):
            desired = wish.instance(self._new_name(wish))
            self._act(Start(desired, 0, f"{wish.count} wanted in {wish.pool}"))

    def _start_again(self, wish: Wish, seen: Observed) -> None:
        due = seen.since + self._backoff.pause_s(seen.failures)
        if due > self._situation.now:
            self.later.append(due)
            return
        if seen.unplaced and wish.pool not in self._situation.room and self._anything_draining():
            return  # what is leaving makes room
        name = seen.desired.instance_id
        placed = seen.phase is Phase.PLACED
        reason = "its place is free" if placed else f"it was lost, {seen.failures} in a row"
        self._act(Start(wish.instance(name), seen.generation + 1, reason))

    def _act(self, action: Action) -> None:
        self._handled.add(action.instance_id)
        self.actions.append(action)

    def _free(self, seen: Observed) -> bool:
        return seen.desired.instance_id not in self._handled

    def _draining(self, pool: str) -> bool:
        return any(
            s.desired.pool == pool and s.phase is Phase.DRAINING and s.becomes is None
            for s in self._fleet.values()
        )

    def _anything_draining(self) -> bool:
        leaving = any(s.phase is Phase.DRAINING for s in self._fleet.values())
        return leaving or any(isinstance(a, Drain | Stop) for a in self.actions)

    def _anything_starting(self) -> bool:
        starting = any(s.phase is Phase.STARTING for s in self._fleet.values())
        return starting or any(isinstance(a, Start) for a in self.actions)

    def _reserve(self, becomes: Desired) -> None:
        self._names.add(becomes.instance_id)
        self._reserved[becomes.pool] = self._reserved.get(becomes.pool, 0) + 1

    def _new_name(self, wish: Wish) -> InstanceId:
        """Return the lowest name of a pool that nobody has or will have."""
        name = next(n for i in count() if (n := InstanceId(f"{wish.pool}-{i}")) not in self._names)
        self._names.add(name)
        return name


def _runs(seen: Observed) -> bool:
    return seen.phase in (Phase.STARTING, Phase.READY)


def _order(name: InstanceId) -> tuple[str, int]:
    pool, _, number = name.rpartition("-")
    return pool, int(number)


def missing(wishes: Iterable[Wish], fleet: Fleet) -> list[str]:
    """Return the pools in which something is not yet as it should be, each with what it has."""
    found = []
    for wish in wishes:
        pool = [s for s in fleet.values() if s.desired.pool == wish.pool]
        ready = sum(s.phase is Phase.READY and s.desired.revision == wish.revision for s in pool)
        if ready != wish.count or len(pool) != wish.count:
            found.append(f"{wish.pool} {ready} of {wish.count}")
    return found
