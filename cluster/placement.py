"""Where instances go, and whether they can go anywhere. Pure: no Ray.

A stage's ranks talk after every layer, so each stage is one bundle, which Ray puts on one node.
Stages talk once per step: they share a node where there is room, and else are spread over several.
Each instance has a placement group of its own, so that pools can grow and shrink.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from baton.core.cluster_spec import ClusterSpec, PoolSpec

Resources = Mapping[str, float]
"""Amounts by Ray's names, such as {"CPU": 2, "GPU": 1}."""
_TINY = 1e-6
"""Ray counts in units of 1e-4; sums of floats are off by less than this."""


@dataclass(frozen=True, slots=True)
class Room:
    """What one instance needs."""

    bundles: tuple[Resources, ...]
    """Of each stage: what all its ranks take, on one node."""

    @property
    def strategy(self) -> str:
        """How Ray is to place the bundles."""
        return "STRICT_PACK" if len(self.bundles) == 1 else "PACK"


@dataclass(frozen=True, slots=True)
class Node:
    """A machine of the Ray cluster."""

    node_id: str
    address: str
    total: Resources
    free: Resources


def room_of(pool: PoolSpec) -> Room:
    """Return what one instance of a pool needs."""
    ranks = pool.parallel.stage_size
    one = {"CPU": pool.resources.cpus, "GPU": pool.resources.gpus, **pool.resources.custom}
    stage = {name: amount * ranks for name, amount in one.items() if amount > 0}
    return Room((stage,) * pool.parallel.pp)


def cpus_of(spec: ClusterSpec) -> float:
    """Return the CPUs that all instances of a spec take."""
    pools = (pool for _, pool in spec.pools().values())
    return sum(b["CPU"] * pool.instances for pool in pools for b in room_of(pool).bundles)


def fits(room: Room, nodes: Iterable[Node]) -> bool:
    """Return whether one more instance has room now, tried bundle by bundle, node by node."""
    left = [dict(node.free) for node in nodes]
    for bundle in room.bundles:
        free = next((f for f in left if _lacks(bundle, f) is None), None)
        if free is None:
            return False
        for name, amount in bundle.items():
            free[name] = free.get(name, 0.0) - amount
    return True


def best_node(room: Room, nodes: Sequence[Node], siblings: Mapping[str, int]) -> str | None:
    """Return the node for an instance of one stage: the one with fewest of its pool's.

    `siblings` counts them by node. None if it has more stages, or if there is no room anywhere:
    then Ray decides.
    """
    if len(room.bundles) > 1:
        return None
    able = [n for n in nodes if _lacks(room.bundles[0], n.free) is None]
    best = min(able, key=lambda n: (siblings.get(n.node_id, 0), -_cpus(n)), default=None)
    return best.node_id if best else None


def lacking(pools: Mapping[str, tuple[PoolSpec, int]], nodes: Sequence[Node]) -> str | None:
    """Return what these nodes lack, in words, for so many instances of each pool; None: nothing.

    They may be busy with something else; what is told is what waiting cannot bring.
    """
    wanted: dict[str, float] = {}
    for name, (pool, count) in pools.items():
        for bundle in room_of(pool).bundles if count else ():
            gaps = [_lacks(bundle, node.total) for node in nodes]
            if all(gaps):
                ranks = f"{pool.parallel.stage_size} ranks of {name} belong on one node"
                return f"{ranks} with {_shown(bundle)}; there is none: {_rooms(bundle, nodes)}"
            for resource, amount in bundle.items():
                wanted[resource] = wanted.get(resource, 0.0) + amount * count
    for resource, amount in wanted.items():
        there = sum(node.total.get(resource, 0.0) for node in nodes)
        if there < amount - _TINY:
            return f"all pools take {resource} {amount:g}; all nodes have {there:g}"
    return None


def _lacks(bundle: Resources, room: Resources) -> str | None:
    """Return a resource of which there is too little, or None."""
    for name, amount in bundle.items():
        if room.get(name, 0.0) < amount - _TINY:
            return name
    return None


def _rooms(bundle: Resources, nodes: Sequence[Node]) -> str:
    shown = [
        _shown({name: node.total.get(name, 0.0) for name in bundle}) + f" at {node.address}"
        for node in nodes
    ]
    return "; ".join(shown) or "no node is alive"


def _shown(resources: Resources) -> str:
    return ", ".join(f"{name} {amount:g}" for name, amount in resources.items())


def _cpus(node: Node) -> float:
    return node.free.get("CPU", 0.0)
