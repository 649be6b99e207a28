"""The placement groups of all instances: reserved, found again, given back."""

from collections import Counter
from collections.abc import Iterable, Mapping

from baton.cluster import ray_calls
from baton.cluster.instance import Place
from baton.cluster.placement import best_node, fits, lacking, room_of
from baton.cluster.state import Handles
from baton.core.clock import monotonic
from baton.core.cluster_spec import ClusterSpec, PoolSpec
from baton.core.errors import BatonError, Unavailable
from baton.core.log import get_logger

_CALL_TIMEOUT_S = 10.0
PLACE_TIMEOUT_S = 30.0
"""For room that is there, but taken."""

_DISTRUST_S = 15.0
"""After which Ray has noticed as well, or all is well."""

_log = get_logger("places")


class PlaceKeeper:
    """Knows the placement group of each place by the place's name; one event loop only."""

    def __init__(self, *, detached: bool) -> None:
        """`detached`: they outlive this process, and so do the actors in them."""
        self._detached = detached
        self._groups: dict[str, ray_calls.Places] = {}
        self._nodes: dict[str, tuple[str, list[str]]] = {}
        """Of each place: the pool, and the node of each stage."""
        self._distrusted: dict[str, float] = {}
        """Addresses of nodes that may be gone, and until when that counts."""

    def __repr__(self) -> str:
        return f"PlaceKeeper({', '.join(self._groups)})"

    async def get(self, handles: Handles, pool: str, spec: ClusterSpec) -> Place:
        """Return the place of that name, reserved now if it is not yet.

        Raises Unavailable, with what is missing, if there is none within PLACE_TIMEOUT_S; it is
        given up then.
        """
        found = spec.pools()[pool][1]
        group = self._groups.get(handles.place)
        if group is not None and spec.host:
            # Still there, on this machine: nothing about it can have changed.
            return self._place(group, (spec.host,) * found.parallel.pp, found, handles)
        try:
            group = await self._group(handles.place, pool, found)
            nodes = await ray_calls.await_places(group, PLACE_TIMEOUT_S)
        except BatonError as error:
            await self.give_back(handles.place)
            raise Unavailable(f"{error}{await self._why_not(found)}") from None
        self._nodes[handles.place] = (pool, nodes)
        addresses = {}
        if not spec.host:
            addresses = {n.node_id: n.address for n in await ray_calls.nodes(_CALL_TIMEOUT_S)}
        hosts = tuple(spec.host or addresses.get(node, "") for node in nodes)
        return self._place(group, hosts, found, handles)

    def _place(
        self, group: ray_calls.Places, hosts: tuple[str, ...], pool: PoolSpec, handles: Handles
    ) -> Place:
        actors = handles.actors if self._detached else None
        return Place(group, hosts, pool.resources, actors)

    def distrust(self, address: str) -> None:
        """Reserve nothing on a node for a while, if there is room elsewhere: it may be gone."""
        self._distrusted[address] = monotonic() + _DISTRUST_S

    async def give_back(self, place: str) -> None:
        """Release a place, if it is there."""
        self._nodes.pop(place, None)
        group = self._groups.pop(place, None)
        try:
            if group is None and self._detached:
                group = await ray_calls.find_places(place, _CALL_TIMEOUT_S)
            if group is not None:
                await ray_calls.release(group, _CALL_TIMEOUT_S)
        except BatonError as error:
            _log.info("a place was not given back", place=place, error=str(error))

    async def pools_with_room(self, pools: Mapping[str, PoolSpec]) -> frozenset[str]:
        """Return those for which there is room for one more instance."""
        nodes = await ray_calls.nodes(_CALL_TIMEOUT_S)
        return frozenset(name for name, pool in pools.items() if fits(room_of(pool), nodes))

    async def lacking(self, pools: Mapping[str, tuple[PoolSpec, int]]) -> str | None:
        """Return what all nodes together lack for so many instances of each pool; None: nothing."""
        return lacking(pools, await ray_calls.nodes(_CALL_TIMEOUT_S))

    async def _group(self, name: str, pool: str, found: PoolSpec) -> ray_calls.Places:
        group = self._groups.get(name)
        if group is None and self._detached:
            group = await ray_calls.find_places(name, _CALL_TIMEOUT_S)
        if group is None:
            room = room_of(found)
            nodes = await ray_calls.nodes(_CALL_TIMEOUT_S)
            siblings = Counter(_nodes_of(pool, self._nodes.values()))
            now = monotonic()
            trusted = [n for n in nodes if self._distrusted.get(n.address, now) <= now]
            node = best_node(room, trusted, siblings) or best_node(room, nodes, siblings)
            if node is not None:
                # From now on: others of its pool are placed before Ray has said where this one is.
                self._nodes[name] = (pool, [node])
            group = await ray_calls.reserve(
                room,
                node_id=node,
                name=name if self._detached else None,
                timeout_s=_CALL_TIMEOUT_S,
            )
        self._groups[name] = group
        return group

    async def _why_not(self, pool: PoolSpec) -> str:
        """Return what may be the reason, in words, if Ray answers."""
        try:
            nodes = await ray_calls.nodes(_CALL_TIMEOUT_S)
        except BatonError:
            return ""
        room = room_of(pool)
        free = (
            ", ".join(f"{name} {n.free.get(name, 0):g}" for name in room.bundles[0]) for n in nodes
        )
        return f"; {lacking({'it': (pool, 1)}, nodes) or 'free on each node: ' + '; '.join(free)}"


def _nodes_of(pool: str, places: Iterable[tuple[str, list[str]]]) -> list[str]:
    return [nodes[0] for owner, nodes in places if owner == pool]
