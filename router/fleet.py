"""The instances of a membership as arrays: what does not change while they are there."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from baton.core.topology import InstanceInfo, Role
from baton.router.affinity import marks_of
from baton.router.load import InstanceKey, key_of
from baton.router.state import RouterState


class Pool:
    """The instances that can play one part, in the order of their tie-break."""

    def __init__(self, instances: Sequence[InstanceInfo], state: RouterState, salt: str) -> None:
        """`salt`: each gateway breaks ties in an order of its own; "": by name."""
        names = [str(i.instance_id) for i in instances]
        turns = marks_of([salt + name for name in names]).tolist() if salt else names
        order = sorted(range(len(names)), key=lambda n: (turns[n], names[n]))
        self.instances = tuple(instances[n] for n in order)
        self.keys: tuple[InstanceKey, ...] = tuple(map(key_of, self.instances))
        self.places = {key: place for place, key in enumerate(self.keys)}
        """By key, the index into everything here."""
        self.rows: NDArray[np.int64] = np.array([state.row(k) for k in self.keys], np.int64)
        self.kv_tokens = np.array([i.kv_tokens for i in self.instances], np.float64)
        self.max_model_len = np.array([i.max_model_len for i in self.instances], np.int64)
        self.mixed = np.array([i.role is Role.MIXED for i in self.instances], bool)
        self.marks = marks_of([str(i.instance_id) for i in self.instances])
        kinds = sorted({i.compatibility for i in self.instances})
        self.kinds = {
            kind: np.array([i.compatibility == kind for i in self.instances], bool)
            for kind in kinds
        }
        """By compatibility, who is of it: only these can hand over to one another."""

    def __len__(self) -> int:
        return len(self.instances)


class Fleet:
    """Both pools of one membership."""

    def __init__(self, instances: tuple[InstanceInfo, ...], state: RouterState, salt: str) -> None:
        self.instances = instances
        by_role = {role: [i for i in instances if i.role is role] for role in Role}
        self.decode = Pool(by_role[Role.DECODE] + by_role[Role.MIXED], state, salt)
        self.prefill = Pool(by_role[Role.PREFILL], state, salt)

    def __repr__(self) -> str:
        return f"Fleet({len(self.decode)} decode, {len(self.prefill)} prefill)"


class Fleets:
    """The fleets of the last few memberships: one that differs is for a request that moves."""

    _KEPT = 4

    def __init__(self, state: RouterState, salt: str) -> None:
        self._state = state
        self._salt = salt
        self._fleets: list[Fleet] = []

    def of(self, instances: tuple[InstanceInfo, ...]) -> Fleet:
        """Return the fleet of these instances."""
        for fleet in self._fleets:
            if fleet.instances == instances:  # cheap: mostly the same objects
                return fleet
        if self._state.keep_only({key_of(i) for i in instances}):
            self._fleets.clear()
        fleet = Fleet(instances, self._state, self._salt)
        self._fleets = [fleet, *self._fleets][: self._KEPT]
        return fleet
