"""Sizes pools by their load: looks every second, and gives the orders that autoscale.py says.

What it remembers goes with its process. The next controller finds the sizes in the state, and sees
for as long as the first one had to before it changes anything.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from baton.cluster import ray_calls
from baton.cluster.autoscale import Giver, Memory, Verdict, decide, giver_for
from baton.cluster.control import Control
from baton.cluster.fleet import Phase
from baton.cluster.gateway_keeper import GatewayKeeper
from baton.cluster.orders import Order, give
from baton.cluster.placement import Resources, room_of
from baton.cluster.signals import signals_of
from baton.cluster.state import ControlState, scaled, told_to_flip
from baton.core.autoscale import AutoscaleConfig
from baton.core.clock import Clock, monotonic
from baton.core.errors import BatonError, InvalidRequest
from baton.core.ids import InstanceId

_EVERY_S = 1.0
_CALL_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class _Look:
    """What was made of all pools at one time."""

    at: float
    state: ControlState
    givers: Mapping[str, Giver]
    """Every pool of which enough is known, by name."""


class Autoscaler:
    """Start `run()` as a task; after its end, `close`. One event loop only."""

    def __init__(
        self, control: Control, gateways: GatewayKeeper, *, clock: Clock = monotonic
    ) -> None:
        self._control = control
        self._gateways = gateways
        self._clock = clock
        self._memories: dict[str, Memory] = {}
        self._lacking: dict[str, int] = {}
        """Pools that Ray's nodes cannot hold as large as they should be, each with how large."""
        self._asked: list[Resources] | None = None
        """What Ray's own autoscaler was last asked for; None: nothing by this process."""
        self._told: dict[str, str] = {}
        """The last trouble of each pool: the same one is not told again."""

    def __repr__(self) -> str:
        return f"Autoscaler({self._memories}, lacking={self._lacking})"

    async def run(self) -> None:
        """Look, and look again, until cancelled."""
        while True:
            await asyncio.sleep(_EVERY_S)
            try:
                await self._look()
            except BatonError as error:
                self._trouble("autoscaler", f"it did not get to its end: {error}")

    async def close(self) -> None:
        """Ask Ray's autoscaler for nothing any more."""
        self._lacking.clear()
        try:
            await self._ask_ray(self._control.state)
        except BatonError as error:
            self._trouble("autoscaler", str(error))

    async def _look(self) -> None:
        state = self._control.state
        configs = {
            name: pool.autoscale
            for name, (_, pool) in state.spec.pools().items()
            if pool.autoscale is not None and state.counts[name] >= pool.autoscale.min
        }  # only a cluster that goes down has less than that
        self._lacking = {n: size for n, size in self._lacking.items() if n in configs}
        if configs:
            verdicts, look = await self._judge(state, configs)
            for pool, verdict in verdicts.items():
                await self._act(pool, verdict, look)
        if configs or self._asked:
            await self._ask_ray(self._control.state)

    async def _judge(
        self, state: ControlState, configs: Mapping[str, AutoscaleConfig]
    ) -> tuple[dict[str, Verdict], _Look]:
        told = [status.info for status in await self._gateways.status()]
        gateways = [info for info in told if info is not None]
        reports, now = self._control.reports(), self._clock()
        verdicts, givers = {}, {}
        for pool, config in configs.items():
            signals = signals_of(state, pool, reports, gateways)
            if signals is not None:
                count, memory = state.counts[pool], self._memories.get(pool, Memory())
                verdict = verdicts[pool] = decide(config, count, signals, memory, now)
                self._memories[pool] = verdict.memory
                givers[pool] = Giver(pool, config, count, verdict.memory)
        return verdicts, _Look(now, state, givers)

    async def _act(self, pool: str, verdict: Verdict, look: _Look) -> None:
        count = look.state.counts[pool]
        if self._control.state.counts[pool] != count:
            return  # it has changed since
        if verdict.target > count:
            await self._grow(pool, verdict, look)
        elif verdict.target < count:
            await self._resize(pool, verdict.target, verdict.reason)
        elif verdict.memory.over is None:
            self._lacking.pop(pool, None)

    async def _grow(self, pool: str, verdict: Verdict, look: _Look) -> None:
        """Let a pool grow as far as there is room; else by a flip; else ask Ray for nodes."""
        control, count = self._control, look.state.counts[pool]
        if pool not in await control.pools_with_room() and await self._flip(pool, verdict, look):
            return
        missing = None
        for target in range(verdict.target, count, -1):
            missing = await control.lacking(scaled(control.state, pool, target))
            if missing is None:
                await self._resize(pool, target, verdict.reason)
                return
        self._lacking[pool] = verdict.target
        why = f"{verdict.target} would be right: {verdict.reason}"
        self._trouble(pool, f"{why}; Ray is asked for more nodes: {missing}")

    async def _flip(self, pool: str, verdict: Verdict, look: _Look) -> bool:
        """Give a pool the place of one of the other role, if one can spare it."""
        found = {n: _flippable(self._control.state, n, pool) for n in look.givers}
        able = {giver: name for giver, name in found.items() if name is not None}
        givers = [look.givers[n] for n in able]
        giver = giver_for(look.givers[pool].config, givers, look.at)
        if giver is None:
            return False
        name = able[giver.pool]
        reason = f"{pool} takes its place: {verdict.reason}, and {giver.pool} would do with fewer"
        change = partial(told_to_flip, name=name)
        await give(self._control, Order(name, reason, change, by="autoscale"))
        self._done(pool)
        self._memories[giver.pool] = Memory()
        return True

    async def _resize(self, pool: str, target: int, reason: str) -> None:
        text = f"{self._control.state.counts[pool]} to {target}: {reason}"
        change = partial(scaled, pool=pool, count=target)
        await give(self._control, Order(pool, text, change, by="autoscale"))
        self._done(pool)

    def _done(self, pool: str) -> None:
        self._lacking.pop(pool, None)
        self._told.pop(pool, None)

    async def _ask_ray(self, state: ControlState) -> None:
        """Let Ray's autoscaler know all that should find room, if something does not."""
        wanted: list[Resources] = []
        if self._lacking:
            counts = {n: max(c, self._lacking.get(n, 0)) for n, c in state.counts.items()}
            for name, (_, pool) in state.spec.pools().items():
                wanted += list(room_of(pool).bundles) * counts[name]
        if wanted != self._asked:
            await ray_calls.request_resources(wanted, _CALL_TIMEOUT_S)
            self._asked = wanted

    def _trouble(self, whom: str, text: str) -> None:
        if self._told.get(whom) != text:
            self._told[whom] = text
            self._control.journal.add("trouble", whom, text)


def _flippable(state: ControlState, giver: str, taker: str) -> InstanceId | None:
    """Return the instance of `giver` that would be flipped into `taker`; None if none can be."""
    ready = [
        name
        for name, seen in state.fleet.items()
        if seen.desired.pool == giver and seen.phase is Phase.READY
    ]
    for name in reversed(ready):
        try:
            flipped = told_to_flip(state, name)
        except InvalidRequest:
            continue
        if flipped.leaving[name] == taker:
            return name
    return None
