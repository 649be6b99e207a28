"""What the controller does: hosts one Control and the gateways, and answers commands.

It goes on where an earlier controller stopped: reads the state, adopts whoever runs, and starts the
rest again; gateways and instances go on meanwhile.
"""

import asyncio
import os
import secrets
import traceback
from collections.abc import Awaitable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from baton.api.lease_keeper import Terms
from baton.cluster import store
from baton.cluster.actor_process import or_exit
from baton.cluster.autoscaler import Autoscaler
from baton.cluster.control import Control
from baton.cluster.fleet import Observed
from baton.cluster.gateway_keeper import GatewayKeeper
from baton.cluster.journal import Event
from baton.cluster.orders import Order, give, refuse_impossible
from baton.cluster.reading import reading
from baton.cluster.state import (
    ControlState,
    scaled,
    told_to_flip,
    told_to_leave,
    with_spec,
)
from baton.cluster.status import InstanceStatus, PoolStatus, Status
from baton.cluster.surroundings import Surroundings
from baton.core.clock import monotonic
from baton.core.cluster_spec import ClusterSpec
from baton.core.control_reading import ControlReading
from baton.core.errors import BatonError, DeadlineExceeded, InvalidConfig, Unavailable
from baton.core.ids import InstanceId
from baton.core.log import get_logger
from baton.core.topology import Membership, Role

_log = get_logger("controller")
_LOAD_PAUSE_S = 1.0
_GATEWAYS_EVERY_S = 5.0
_STATS_TIMEOUT_S = 3.0
_END_MARGIN_S = 30.0
"""For instances to end, once they have drained."""


class Controller:
    """Idle until `apply` if there is no state. One event loop only."""

    def __init__(self, log_dir: Path, factories: Mapping[Role, str]) -> None:
        """`factories`: the class that does each role's work; see surroundings.FACTORIES."""
        self._surroundings = Surroundings(
            log_dir=log_dir,
            save=self._save,
            rules=self._rules,
            detached=True,
            factories=factories,
            terms=Terms(f"controller/{secrets.token_hex(8)}", controls=True),
        )
        self._owner = ""
        self._control: Control | None = None
        self._gateways: GatewayKeeper | None = None
        self._scaler: Autoscaler | None = None
        self._running: asyncio.Task[None] | None = None
        self._helping: list[asyncio.Task[None]] = []
        """What changes what is wanted by itself: to be ended before everything else is."""
        self._gateway_trouble = ""
        """What last kept gateways from being as wanted: it is told once."""
        self._unreadable: InvalidConfig | None = None
        """Why nothing can be done: the state that was found."""
        self._applying = asyncio.Lock()

    async def recover(self) -> None:
        """Go on where an earlier controller stopped, if there was one.

        What it left may not be readable: everything that is asked of this one is refused then.
        """
        try:
            state = await self._found()
        except InvalidConfig as error:
            _log.error("this controller touches nothing", reason=str(error))
            self._unreadable = error
            return
        if state is not None:
            async with self._applying:
                await self._begin(state)

    async def _found(self) -> ControlState | None:
        """Claim and read the state, as soon as Ray's head answers."""
        while True:
            try:
                self._owner = await store.claim()
                return await store.load(monotonic())
            except Unavailable:
                traceback.print_exc()
                await asyncio.sleep(_LOAD_PAUSE_S)

    async def _rules(self) -> bool:
        """Return whether Ray's head answers; if it knows a later controller, this process ends."""
        try:
            owned = await store.owned(self._owner)
        except BatonError:
            return False
        if not owned:
            _log.error("another controller has taken over; this one was cut off, and ends")
            os._exit(1)
        return True

    async def _save(self, state: ControlState) -> None:
        if not await self._rules():
            raise Unavailable("Ray's head does not answer")
        await store.save(state)

    async def _begin(self, state: ControlState) -> None:
        self._control = control = Control(state, self._surroundings)
        self._gateways = GatewayKeeper(control, self._surroundings.log_dir)
        self._scaler = Autoscaler(control, self._gateways)
        self._running = asyncio.create_task(or_exit(control.run()))
        await control.known.wait()
        await self._ensure_gateways(self._gateways)
        self._helping = [
            asyncio.create_task(or_exit(self._scaler.run())),
            asyncio.create_task(or_exit(self._keep_gateways(self._gateways))),
        ]

    async def _keep_gateways(self, gateways: GatewayKeeper) -> None:
        """Look after the gateways: Ray starts one again, but not always, and not one that hangs."""
        while True:
            await asyncio.sleep(_GATEWAYS_EVERY_S)
            async with self._applying:
                await self._ensure_gateways(gateways)
            await gateways.look()

    async def _ensure_gateways(self, gateways: GatewayKeeper) -> None:
        trouble = ""
        try:
            await gateways.ensure()
        except BatonError as error:
            assert self._control is not None, "gateways without a control"
            trouble = str(error)
            if trouble != self._gateway_trouble:
                self._control.journal.add("trouble", "gateways", trouble)
        self._gateway_trouble = trouble

    async def apply(self, spec: ClusterSpec) -> bool:
        """Want what a spec says; return whether that changes anything.

        Raises Unavailable if Ray's nodes can never hold it.
        """
        async with self._applying:
            self._expect_readable()
            control, gateways = self._control, self._gateways
            if control is None or gateways is None:
                state = ControlState.of(spec.with_secrets())
                await refuse_impossible(Control(state, self._surroundings), state)
                await self._begin(state)
                return True
            state = with_spec(control.state, spec)
            if (state.spec, state.counts) == (control.state.spec, control.state.counts):
                await self._ensure_gateways(gateways)  # one may not have started the last time
                return False
            await refuse_impossible(control, state)
            await control.change(lambda now: with_spec(now, spec))
            control.journal.add("told", "cluster", "another spec")
            await self._ensure_gateways(gateways)
            return True

    async def scale(self, pool: str, count: int) -> bool:
        """Want so many instances in a pool; return whether that changes anything."""
        told = f"{count} instances are wanted"
        return await self._order(Order(pool, told, lambda state: scaled(state, pool, count)))

    async def drain(self, instance: str) -> None:
        """Let an instance leave; its pool is then one fewer."""
        await self._order(Order(instance, "leave", lambda s: told_to_leave(s, instance)))

    async def flip(self, instance: str) -> None:
        """Let an instance leave, and another, of the other role, take its place."""
        await self._order(Order(instance, "flip", lambda state: told_to_flip(state, instance)))

    async def _order(self, order: Order) -> bool:
        control, _ = self._there()
        return await give(control, order)

    async def status(self) -> Status:
        """Return who is there."""
        control, gateways = self._there()
        # All of one moment; what instances tell of themselves comes a little later.
        state, settled = control.state, control.settled.is_set()
        epoch = control.board.current.version
        pools = [
            PoolStatus(
                name=name,
                role=pool.role.value,
                model=model.name,
                wanted=state.counts[name],
                instances=tuple(
                    [
                        await _instance_status(control, state, instance, seen)
                        for instance, seen in sorted(state.fleet.items())
                        if seen.desired.pool == name
                    ]
                ),
            )
            for name, (model, pool) in state.spec.pools().items()
        ]
        return Status(
            controller_pid=os.getpid(),
            epoch=epoch,
            settled=settled,
            drain_timeout_s=state.spec.drain_timeout_s,
            pools=tuple(pools),
            gateways=await gateways.status(),
        )

    async def reading(self) -> ControlReading:
        """Return what gateways export of this controller and its pools."""
        control, _ = self._there()
        return reading(control)

    async def stats(self, instance: str) -> list[dict[str, float | int | str]]:
        """Return the counters of each rank of an instance; InstanceLost if it is not there."""
        control, _ = self._there()
        return await control.stats(InstanceId(instance))

    async def events(self, after: int, timeout_s: float) -> tuple[tuple[Event, ...], bool]:
        """Wait for events after the one of that number, at most so long.

        Returns them, and whether everything is as it is wanted.
        """
        control, _ = self._there()
        events = await _within(timeout_s, control.journal.newer_than(after)) or ()
        return events, control.settled.is_set()

    async def membership(self, version: int, timeout_s: float) -> Membership:
        """Wait for a membership of a higher version, at most so long; return the latest."""
        control, _ = self._there()
        if await _within(timeout_s, control.known.wait()) is None:
            raise Unavailable("who is there is not known yet")
        await _within(timeout_s, control.board.newer_than(version))
        return control.board.current

    async def down(self) -> None:
        """Drain and end everything, and forget it; does nothing if nothing is up.

        Raises Unavailable if Ray does not let it be ended; it can be tried again then.
        """
        async with self._applying:
            self._expect_readable()
            if self._control is None:
                return
            control, gateways = self._there()
            await self._stop_helping()
            await gateways.close_all()
            await control.change(
                lambda state: replace(state, counts=dict.fromkeys(state.counts, 0))
            )
            limit_s = control.state.spec.drain_timeout_s + _END_MARGIN_S
            if await _within(limit_s, control.settled.wait()) is None:
                raise DeadlineExceeded(f"not everybody had left after {limit_s:g} s")
            assert self._running is not None, "a control that does not run"
            self._running.cancel()
            await asyncio.wait({self._running})
            self._control = self._gateways = self._running = None
            await store.forget()

    async def _stop_helping(self) -> None:
        """Let nothing bring back what is to go."""
        for task in self._helping:
            task.cancel()
            await asyncio.wait({task})
        self._helping = []
        if self._scaler is not None:
            await self._scaler.close()
            self._scaler = None

    def _expect_readable(self) -> None:
        if self._unreadable is not None:
            raise self._unreadable

    def _there(self) -> tuple[Control, GatewayKeeper]:
        self._expect_readable()
        if self._control is None or self._gateways is None:
            raise Unavailable("nothing is up here; `baton up` starts it")
        return self._control, self._gateways


async def _within(timeout_s: float, work: Awaitable[Any]) -> Any:
    """Return what comes of some work, or None if it takes too long."""
    with suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            return await work
    return None


async def _instance_status(
    control: Control, state: ControlState, name: InstanceId, seen: Observed
) -> InstanceStatus:
    ranks = state.handles[name].ranks
    basic = InstanceStatus(name, seen.phase.value, seen.generation, ranks)
    info = seen.info
    if info is None:
        return basic
    ready = replace(
        basic,
        incarnation=info.incarnation,
        pid=info.pid,
        address=info.address,
        kv_tokens=info.kv_tokens,
    )
    try:
        stats = await _within(_STATS_TIMEOUT_S, control.stats(name))
    except BatonError:
        stats = None
    if not stats:
        return ready
    counts = {k: int(v) for k, v in stats[0].items() if k.startswith("blocks_") or k in _COUNTS}
    blocks = sum(counts.get(f"blocks_{kind}", 0) for kind in ("free", "used", "cached", "fencing"))
    return replace(
        ready,
        kv_used=counts.get("blocks_used", 0) / blocks if blocks else None,
        running=counts.get("running"),
        waiting=counts.get("waiting"),
    )


_COUNTS = ("running", "waiting")
