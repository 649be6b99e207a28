"""What tests of the planner have in common: instances, and a world that does as it is told."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from baton.cluster.fleet import (
    Action,
    Backoff,
    Desired,
    Fleet,
    Phase,
    Start,
    acted,
    became_ready,
    gone,
    was_lost,
)
from baton.cluster.placement import Node, Room, fits
from baton.cluster.plan import Plan, Situation, Wish, make_plan
from baton.core.ids import Incarnation, InstanceId
from baton.core.topology import InstanceInfo, Role

BACKOFF = Backoff(first_s=1.0, cap_s=8.0, forgive_s=100.0)
P = Wish("prefill", Role.PREFILL, 1, "a", "m")
D = Wish("decode", Role.DECODE, 2, "a", "m")


def info(want: Desired, incarnation: int = 1) -> InstanceInfo:
    """Return what an instance says of itself."""
    return InstanceInfo(
        instance_id=want.instance_id,
        role=want.role,
        address="127.0.0.1:1",
        incarnation=Incarnation(incarnation),
        pid=1,
        model="m",
        compatibility="c",
        max_model_len=1,
        kv_tokens=1,
        max_sequences=1,
        load_s=0.0,
    )


class World:
    """A fleet, and places: nothing happens by itself, and every event is a call."""

    def __init__(self, *wishes: Wish, places: int = 100) -> None:
        self.wishes = wishes
        self.leaving: dict[InstanceId, str] = {}
        self.fleet: Fleet = {}
        self.places = places
        self.now = 0.0
        self.running: set[InstanceId] = set()
        """Whose processes are there."""

    def plan(self) -> Plan:
        """Decide, without doing anything."""
        situation = Situation(self.wishes, self.leaving, self.fleet, self.room(), self.now)
        return make_plan(situation, BACKOFF)

    def room(self) -> frozenset[str]:
        """Return the pools for which there is room for one more."""
        return frozenset(w.pool for w in self.wishes if len(self.fleet) < self.places)

    def step(self) -> tuple[Action, ...]:
        """Decide, and begin what was decided."""
        actions = self.plan().actions
        for action in actions:
            if isinstance(action, Start):
                assert action.instance_id not in self.running, "two incarnations of one instance"
                self.running.add(action.instance_id)
            self.fleet = acted(self.fleet, action, self.now)
        return actions

    def ready(self, name: str) -> None:
        """Let an instance become ready, if it starts."""
        seen = self.fleet[InstanceId(name)]
        self.fleet = became_ready(
            self.fleet, InstanceId(name), seen.generation, info(seen.desired), self.now
        )

    def lose(self, name: str, *, unplaced: bool = False) -> None:
        """Let an instance's processes end, or find no room."""
        seen = self.fleet[InstanceId(name)]
        self.running.discard(InstanceId(name))
        self.fleet = was_lost(
            self.fleet,
            seen.desired.instance_id,
            seen.generation,
            self.now,
            BACKOFF,
            unplaced=unplaced,
        )

    def gone(self, name: str) -> None:
        """Let an instance that drains end."""
        seen = self.fleet[InstanceId(name)]
        if seen.phase is Phase.DRAINING:
            self.running.discard(InstanceId(name))
        self.fleet = gone(self.fleet, InstanceId(name), seen.generation, self.now)
        self.leaving.pop(InstanceId(name), None)

    def settle(self, steps: int = 60) -> None:
        """Let everything succeed until there is nothing more to be done."""
        for _ in range(steps):
            self.now += 10.0
            actions = self.step()
            for name, seen in list(self.fleet.items()):
                if seen.phase is Phase.DRAINING:
                    self.gone(name)
                elif seen.phase is Phase.STARTING:
                    self.ready(name)
            if not actions and not self.plan().actions:
                return
        raise AssertionError(f"not settled: {self.fleet}")

    def want(self, pool: str, **changes: object) -> None:
        """Wish something else of a pool."""
        self.wishes = tuple(
            replace(w, **changes) if w.pool == pool else w  # type: ignore[arg-type]
            for w in self.wishes
        )

    def ready_in(self, pool: str) -> int:
        """Return how many of a pool are ready."""
        return sum(s.phase is Phase.READY and s.desired.pool == pool for s in self.fleet.values())

    def names(self) -> list[str]:
        """Return who is there."""
        return sorted(self.fleet)


class Machines(World):
    """A world whose places lie on nodes: an instance needs so much on each of so many of them."""

    def __init__(self, *wishes: Wish, nodes: Sequence[int], needs: Mapping[str, Sequence[int]]):
        """`nodes`: what each has; `needs`: by revision, of each stage of an instance."""
        super().__init__(*wishes)
        self.free = list(nodes)
        self.needs = needs
        self.taken: dict[InstanceId, list[tuple[int, int]]] = {}
        """By each: nodes, and how much of them."""

    def room(self) -> frozenset[str]:
        """Return the pools for which there is room for one more."""
        nodes = [Node(str(i), "", {}, {"CPU": free}) for i, free in enumerate(self.free)]
        return frozenset(
            w.pool
            for w in self.wishes
            if fits(Room(tuple({"CPU": n} for n in self.needs[w.revision])), nodes)
        )

    def place(self, name: str) -> bool:
        """Find room for one that starts, as Ray does: all of it or none."""
        seen, left, found = self.fleet[InstanceId(name)], list(self.free), []
        if seen.desired.instance_id in self.taken:
            return True
        for need in self.needs[seen.desired.revision]:
            index = next((i for i, free in enumerate(left) if free >= need), None)
            if index is None:
                return False
            left[index] -= need
            found.append((index, need))
        self.free, self.taken[seen.desired.instance_id] = left, found
        return True

    def ready(self, name: str) -> None:
        """Let one that starts become ready, or be lost for want of room."""
        if self.fleet[InstanceId(name)].phase is not Phase.STARTING or self.place(name):
            super().ready(name)
        else:
            self.lose(name, unplaced=True)

    def gone(self, name: str) -> None:
        """Let one that drains end, and give back what it had."""
        drains = self.fleet[InstanceId(name)].phase is Phase.DRAINING
        super().gone(name)
        for index, need in self.taken.pop(InstanceId(name), []) if drains else []:
            self.free[index] += need
