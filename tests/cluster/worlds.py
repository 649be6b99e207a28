"""What tests of the planner have in common: instances, and a world that does as it is told."""

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
from baton.cluster.plan import Plan, Situation, Wish, make_plan
from baton.core.ids import Incarnation, InstanceId
from baton.core.topology import InstanceInfo, Role

BACKOFF = Backoff(first_s=1.0, cap_s=8.0, forgive_s=100.0)
P = Wish("prefill", Role.PREFILL, 1, "a")
D = Wish("decode", Role.DECODE, 2, "a")


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
        room = frozenset(w.pool for w in self.wishes) if len(self.fleet) < self.places else set()
        situation = Situation(self.wishes, self.leaving, self.fleet, frozenset(room), self.now)
        return make_plan(situation, BACKOFF)

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

    def lose(self, name: str) -> None:
        """Let an instance's processes end."""
        seen = self.fleet[InstanceId(name)]
        self.running.discard(InstanceId(name))
        self.fleet = was_lost(self.fleet, InstanceId(name), seen.generation, self.now, BACKOFF)

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
