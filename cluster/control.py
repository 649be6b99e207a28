"""The control plane at work: plans, begins what was planned, and hears how it goes.

    state ──make_plan──▶ actions ──save──▶ begun ──▶ Ray ──▶ events ──▶ state ──▶ …
                                                              └──▶ board (membership)

What is begun is saved first, so that a controller that starts afresh finds everything again.
"""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from typing import Any

from baton.cluster.fleet import (
    Action,
    Desired,
    Drain,
    Fleet,
    Flip,
    Phase,
    Start,
    acted,
    became_ready,
    gone,
    membership_of,
    was_drained,
    was_lost,
)
from baton.cluster.instance import Instance
from baton.cluster.journal import Journal
from baton.cluster.place_keeper import PlaceKeeper
from baton.cluster.plan import Plan, Situation, asks_for_room, make_plan, missing
from baton.cluster.spec import worker_config
from baton.cluster.state import ControlState, begun
from baton.cluster.surroundings import Surroundings
from baton.cluster.watch import Watch
from baton.core.cluster_spec import ClusterSpec
from baton.core.errors import BatonError, InstanceLost
from baton.core.ids import InstanceId
from baton.core.lease import Report
from baton.core.log import get_logger
from baton.core.topology import InstanceInfo, Membership, MembershipBoard

_EPOCHS_AT_ONCE = 1000
"""Versions that are reserved by one save."""
_ADOPT_TIMEOUT_S = 30.0
"""For one that was ready to answer a new controller; gateways judge meanwhile whether it does."""
_KILL_TIMEOUT_S = 10.0
"""For what is left of those that were lost."""
_TRY_AGAIN_S = 1.0
"""After Ray did not answer."""
_STATS_TIMEOUT_S = 30.0

_log = get_logger("control")


@dataclass(slots=True, eq=False)
class _Life:
    """One life of one instance."""

    instance: Instance
    spec: ClusterSpec
    """As it was when this life began."""
    task: "asyncio.Task[None] | None" = None
    placed: bool = False
    """There is room for it, or was when it began."""
    up: asyncio.Event = field(default_factory=asyncio.Event)
    """It is ready, or will never be."""
    over: asyncio.Event = field(default_factory=asyncio.Event)
    """Nothing is left of it."""


class Control:
    """Keeps a Ray cluster as its state wants it, while `run` runs. One event loop only."""

    def __init__(
        self, state: ControlState, surroundings: Surroundings, *, grace_s: float = 10.0
    ) -> None:
        """`grace_s`: for an instance to close in order; may be changed at any time."""
        self.board = MembershipBoard(Membership(state.epoch))
        """Who is ready."""
        self.journal = Journal(logged=surroundings.detached)
        self.settled = asyncio.Event()
        """Everything is as it is wanted; cleared when it is not."""
        self.known = asyncio.Event()
        """The first plan is made, so that `board` is no older than what was saved last."""
        self.grace_s = grace_s
        self.losses = 0
        self.recoveries = 0
        """Instances that were lost, and are ready again."""
        self._state = replace(state, epoch=state.epoch + _EPOCHS_AT_ONCE)
        self._saved_epoch = state.epoch
        self._around = surroundings
        self._places = PlaceKeeper(detached=surroundings.detached)
        self._lives: dict[InstanceId, _Life] = {}
        self._watch = Watch(self.board, surroundings.terms, surroundings.rules, state.spec.tls)
        self._changed = asyncio.Event()
        self._saving = asyncio.Lock()
        self._tasks: asyncio.TaskGroup

    def __repr__(self) -> str:
        phases = ", ".join(f"{name} {seen.phase}" for name, seen in self._state.fleet.items())
        return f"Control({phases or 'nothing'})"

    @property
    def state(self) -> ControlState:
        """What is wanted, and what there is."""
        return self._state

    def check(self) -> None:
        """Assert that the membership is what the fleet says."""
        version = self.board.current.version
        assert self.board.current == membership_of(self._state.fleet, version), "it is stale"

    async def run(self) -> None:
        """Adopt what the state says was begun, then keep everything as wanted, until cancelled."""
        async with asyncio.TaskGroup() as self._tasks:
            self._tasks.create_task(self._watch.run())
            await self._adopt_all()
            while True:
                await self._woken(await self._step())

    async def change(self, change: Callable[[ControlState], ControlState]) -> None:
        """Want something else; raises what `change` raises for what is not allowed.

        Raises Unavailable, and changes nothing, if it cannot be saved.
        """
        async with self._saving:
            await self._save(change)
        self._news()

    def forget(self) -> None:
        """Tell everybody that nobody is there; `run` is to be cancelled next."""
        self._change_fleet({})

    async def lacking(self, state: ControlState) -> str | None:
        """Return what Ray's nodes lack for all that a state wants, in words; None: nothing."""
        counts = {
            name: (pool, state.counts[name]) for name, (_, pool) in state.spec.pools().items()
        }
        return await self._places.lacking(counts)

    async def pools_with_room(self) -> frozenset[str]:
        """Return the pools for which Ray's nodes have room for one more instance."""
        pools = {name: pool for name, (_, pool) in self._state.spec.pools().items()}
        return await self._places.pools_with_room(pools)

    def reports(self) -> dict[InstanceId, Report]:
        """Return what each live instance said last, of those that have."""
        return self._watch.reports()

    @property
    def lease_flaps(self) -> int:
        """Leases that had lapsed and were taken up again by the same life of an instance."""
        return self._watch.lease_flaps

    async def stats(self, name: InstanceId) -> list[dict[str, float | int | str]]:
        """Return the counters of each rank of an instance; InstanceLost if it is not there."""
        life = self._lives.get(name)
        if life is None:
            raise InstanceLost(f"{name} is not running")
        return await life.instance.rank_stats(_STATS_TIMEOUT_S)

    async def kill_all(self) -> None:
        """End the processes of all instances at once."""
        await asyncio.gather(*(life.instance.kill() for life in self._lives.values()))

    # ---- decide ------------------------------------------------------------------------------

    async def _step(self) -> float | None:
        """Plan, save what is to begin, and begin it; return when to look again if nothing comes."""
        now = self._around.clock()
        try:
            room = await self._rooms()
            async with self._saving:
                plan = self._plan(room, now)
                await self._save(lambda state: begun(state, plan.actions, now))
                for action in plan.actions:
                    self._perform(action)
        except BatonError as error:
            self.journal.add("trouble", "controller", f"nothing was begun: {error}")
            return now + _TRY_AGAIN_S
        self._publish()
        self.known.set()
        return plan.ask_again_at

    def _plan(self, room: frozenset[str], now: float) -> Plan:
        state = self._state
        situation = Situation(state.wishes(), state.leaving, state.fleet, room, now)
        return make_plan(situation, self._around.backoff)

    async def _rooms(self) -> frozenset[str]:
        if not asks_for_room(self._state.wishes(), self._state.fleet):
            return frozenset()
        return await self.pools_with_room()

    async def _save(self, change: Callable[[ControlState], ControlState]) -> None:
        """Change the state, once it is saved so; one at a time."""
        assert self._saving.locked(), "two could undo each other's changes"
        changed = change(self._state)
        await self._around.save(changed)
        self._saved_epoch = changed.epoch
        self._state = change(self._state)  # which has heard of events meanwhile

    async def _woken(self, at: float | None) -> None:
        """Wait for news, or until the clock says `at`."""
        clock = self._around.clock
        try:
            async with asyncio.timeout(None if at is None else max(0.0, at - clock())):
                await self._changed.wait()
        except TimeoutError:
            pass
        self._changed.clear()

    # ---- do ----------------------------------------------------------------------------------

    def _perform(self, action: Action) -> None:
        self.journal.add(type(action).__name__.lower(), action.instance_id, action.reason)
        if isinstance(action, Start):
            self._begin_life(action, adopted=False)
        else:
            self._tasks.create_task(self._leave(action))

    def _begin_life(self, start: Start, *, adopted: bool) -> _Life:
        name = start.instance_id
        life = _Life(self._instance(name), self._state.spec, placed=adopted)
        before = self._lives.get(name)
        self._lives[name] = life
        life.task = self._tasks.create_task(self._live(start, life, before, adopted))
        return life

    def _instance(self, name: InstanceId) -> Instance:
        return Instance(
            name,
            self._state.handles[name].ranks,
            self._around.log_dir / f"{name}.log",
            lambda line: self._around.on_progress(f"{name}: {line}"),
        )

    async def _live(self, start: Start, life: _Life, before: _Life | None, adopted: bool) -> None:
        """One life of one instance, from its start to its end; reports both."""
        name = start.instance_id
        try:
            if before is not None:
                await before.over.wait()
            try:
                info = await (self._adopt if adopted else self._start)(start, life)
                life.up.set()
                self._ready(start, info, "adopt" if adopted else "ready")
                await self._watch.ended(info, life.instance)
            except BatonError as error:
                self._move_away(name)
                self._lost(start, error, unplaced=not life.placed)
            finally:
                life.up.set()
                await self._finish(life.instance)
        finally:
            if before is not None:
                await before.over.wait()  # if we were cancelled while it ended
            if self._lives.get(name) is life:
                del self._lives[name]
            life.over.set()

    def _move_away(self, name: InstanceId) -> None:
        """Let the next life of an instance that nobody reaches begin elsewhere, if there is room.

        Ray would keep its place on a node that is gone until it has noticed, and then move it.
        """
        seen, known = self._state.fleet.get(name), self._state.handles.get(name)
        if seen is None or seen.info is None or known is None or seen.phase is not Phase.READY:
            return
        if self._watch.was_unreachable(name):
            handles = {**self._state.handles, name: replace(known, place="")}
            self._state = replace(self._state, handles=handles)
            self._places.distrust(seen.info.address.rpartition(":")[0])
            self._tasks.create_task(self._places.give_back(known.place))

    async def _start(self, start: Start, life: _Life) -> InstanceInfo:
        name, pool = start.instance_id, start.desired.pool
        place = await self._places.get(self._state.handles[name], pool, life.spec)
        life.placed = True
        return await life.instance.start(
            self._around.factories[start.desired.role],
            worker_config(life.spec, pool, name),
            place,
            life.spec.start_timeout_s,
        )

    async def _adopt(self, start: Start, life: _Life) -> InstanceInfo:
        name = start.instance_id
        handles, seen = self._state.handles[name], self._state.fleet[name]
        adopting = life.instance.adopt(handles.actors, life.spec.start_timeout_s)
        if seen.phase is not Phase.READY:
            return await adopting
        try:
            async with asyncio.timeout(_ADOPT_TIMEOUT_S):
                return await adopting
        except TimeoutError:
            text = f"it did not answer the new controller within {_ADOPT_TIMEOUT_S:g} s"
            raise InstanceLost(text) from None

    async def _finish(self, instance: Instance) -> None:
        try:
            await instance.close(self.grace_s)
        except BatonError as error:
            _log.info("not closed in order", instance=repr(instance), error=str(error))

    async def _leave(self, action: Action) -> None:
        """Let an instance go: drain it if it serves, end its processes, give back its place."""
        name = action.instance_id
        life = self._lives.get(name)
        if life is not None:
            if isinstance(action, Drain | Flip):
                await life.up.wait()
                await self._drain(name, life)
            self._change_fleet(was_drained(self._state.fleet, name, action.generation))
            assert life.task is not None, "a life that was never begun"
            life.task.cancel()
            await life.over.wait()
        handles = self._state.handles[name]
        if not isinstance(action, Flip) and handles.place:
            await self._places.give_back(handles.place)
        self._gone(action)

    async def _drain(self, name: InstanceId, life: _Life) -> None:
        try:
            await life.instance.drain(self._state.spec.drain_timeout_s)
        except BatonError as error:
            self.journal.add("trouble", name, f"not drained in order: {error}")

    # ---- adopt -------------------------------------------------------------------------------

    async def _adopt_all(self) -> None:
        """Take over what an earlier controller began.

        Who was ready counts as ready until it is known to be otherwise: gateways have it, and
        whoever is taken off the list ends what it has open.
        """
        kills: list[Coroutine[Any, Any, None]] = []
        for name, seen in self._state.fleet.items():
            start = Start(seen.desired, seen.generation, "it was there")
            if seen.phase in (Phase.PLACED, Phase.LOST):
                kills.append(self._instance(name).kill_named(self._state.handles[name].actors))
                continue
            if seen.phase is Phase.STARTING:
                self._change_fleet(acted(self._state.fleet, start, self._around.clock()))
            self._begin_life(start, adopted=True)
            if seen.phase is Phase.DRAINING:
                self._perform(_leaving_again(name, seen.generation, seen.becomes))
        try:
            async with asyncio.timeout(_KILL_TIMEOUT_S):
                await asyncio.gather(*kills)
        except TimeoutError:
            self.journal.add("trouble", "controller", "not everybody could be ended in time")

    # ---- hear --------------------------------------------------------------------------------

    def _ready(self, start: Start, info: InstanceInfo, how: str) -> None:
        name, now = start.instance_id, self._around.clock()
        self._change_fleet(became_ready(self._state.fleet, name, start.generation, info, now))
        self.recoveries += how == "ready" and start.generation > 0
        self.journal.add(how, name, f"pid {info.pid} at {info.address}, {info.incarnation:016x}")
        self._around.on_news(name, None)

    def _lost(self, start: Start, error: BatonError, *, unplaced: bool) -> None:
        name, rest = start.instance_id, self._around.backoff
        fleet, now = self._state.fleet, self._around.clock()
        fleet = was_lost(fleet, name, start.generation, now, rest, unplaced=unplaced)
        self._change_fleet(fleet)
        seen = self._state.fleet.get(name)
        if seen is not None and seen.phase is Phase.LOST:
            self.losses += 1
            self.journal.add("lost", name, str(error))
            self._around.on_news(name, error)

    def _gone(self, action: Action) -> None:
        name, now = action.instance_id, self._around.clock()
        handles = dict(self._state.handles)
        own = handles.pop(name)
        if isinstance(action, Flip):
            handles[action.becomes.instance_id] = replace(own, actors="")
        leaving = {n: pool for n, pool in self._state.leaving.items() if n != name}
        self._state = replace(self._state, handles=handles, leaving=leaving)
        self._change_fleet(gone(self._state.fleet, name, action.generation, now))
        self.journal.add("gone", name, action.reason)

    def _change_fleet(self, fleet: Fleet) -> None:
        self._state = replace(self._state, fleet=fleet)
        self._news()

    def _news(self) -> None:
        """Bring the board up to date, and let the planner look again."""
        self._publish()
        self._changed.set()

    def _publish(self) -> None:
        version = self.board.current.version + 1
        newer = membership_of(self._state.fleet, version)
        if newer.instances != self.board.current.instances:
            if version <= self._saved_epoch:
                self.board.publish(newer)
            if version + _EPOCHS_AT_ONCE // 2 > self._state.epoch:
                self._state = replace(self._state, epoch=version + _EPOCHS_AT_ONCE)
        if missing(self._state.wishes(), self._state.fleet) or self._adopting():
            self.settled.clear()
        else:
            self.settled.set()

    def _adopting(self) -> bool:
        """Return whether somebody still counts as ready because an earlier controller said so."""
        return any(not life.up.is_set() for life in self._lives.values())


def _leaving_again(name: InstanceId, generation: int, becomes: Desired | None) -> Action:
    """Return the action that an earlier controller did not bring to its end."""
    reason = "it was leaving"
    if becomes is None:
        return Drain(name, generation, reason)
    return Flip(name, generation, becomes, reason)
