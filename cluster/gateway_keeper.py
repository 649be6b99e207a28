"""The gateways of a cluster: started, found again, closed. Ray starts those again that end."""

import asyncio
import hashlib
from dataclasses import replace
from pathlib import Path

from baton.cluster import ray_calls
from baton.cluster.control import Control
from baton.cluster.gateway_actor import CALLS_AT_ONCE, GatewayActor
from baton.cluster.state import ControlState, GatewayHandle
from baton.cluster.status import GatewayInfo, GatewayPlan, GatewayStatus
from baton.core.cluster_spec import ClusterSpec, GatewaySpec, ModelSpec
from baton.core.errors import BatonError, DeadlineExceeded, InstanceLost

_CREATE_TIMEOUT_S = 10.0
_INFO_TIMEOUT_S = 5.0
_MOST_SILENT = 6
"""So many questions in a row without an answer, each of `_INFO_TIMEOUT_S`, are a gateway's end."""
_MARGIN_S = 8.0
"""For a gateway to close, once it has drained."""


def gateway_plans(spec: ClusterSpec) -> dict[str, GatewayPlan]:
    """Return what each gateway of a spec is to be started with, by its name.

    First those of all models, then those of one model alone.
    """
    doors: list[tuple[GatewaySpec, tuple[ModelSpec, ...]]] = []
    if spec.shared_gateways is not None:
        doors.append((spec.shared_gateways, spec.models))
    doors += [(model.gateways, (model,)) for model in spec.models if model.gateways is not None]
    plans: dict[str, GatewayPlan] = {}
    for door, models in doors:
        for number in range(door.count):
            name = f"gateway-{len(plans)}"
            plans[name] = GatewayPlan(
                name=name,
                models={model.front(): model.dir for model in models},
                config=door.of(number),
                tls=spec.tls,
                node_resource=door.node_resource,
            )
    return plans


def revision_of(plan: GatewayPlan) -> str:
    """Return a name for all that a gateway is started with."""
    return hashlib.sha256(repr(plan).encode()).hexdigest()[:12]


class GatewayKeeper:
    """Keeps the gateways that the control's spec wants; one event loop only."""

    def __init__(self, control: Control, log_dir: Path) -> None:
        self._control = control
        self._log_dir = log_dir
        self._pids: dict[str, int] = {}
        """Of those that have answered."""
        self._silent: dict[str, int] = {}
        """How often each of them has not answered since; without those that are given up."""

    async def ensure(self) -> None:
        """Close those that are wanted no more or otherwise, and start what is missing.

        Raises Unavailable if Ray does not answer; what was not done is then still to be done.
        """
        wanted = gateway_plans(self._control.state.spec)
        for name, handle in self._control.state.gateways.items():
            if name not in wanted or revision_of(wanted[name]) != handle.revision:
                await self._close(name, handle)
        for name, plan in wanted.items():
            known = self._control.state.gateways.get(name)
            if known is None or not await _exists(known.actor):
                await self._start(plan)

    async def look(self) -> None:
        """Tell of each gateway that was started again, and let Ray start those that hang.

        One that stands still is ended by its watchdog, long before; this is for one that is cut
        off from its watchdog, or serves on and can be told nothing. Who has not answered yet may
        still be starting.
        """
        handles = self._control.state.gateways.items()
        await asyncio.gather(*(self._look_at(name, handle.actor) for name, handle in handles))

    async def _look_at(self, name: str, actor_name: str) -> None:
        try:
            await self._info(name, actor_name)
        except DeadlineExceeded:
            if name in self._silent:
                self._silent[name] += 1
                if self._silent[name] >= _MOST_SILENT:
                    await self._start_again(name, actor_name)
        except BatonError:
            pass  # an answer, or Ray's silence

    async def _info(self, name: str, actor_name: str) -> GatewayInfo:
        """Ask a gateway how it is; the journal hears of another process than the last one."""
        actor = await ray_calls.find_actor(actor_name, _INFO_TIMEOUT_S)
        info: GatewayInfo = await ray_calls.call(actor, "info", timeout_s=_INFO_TIMEOUT_S)
        before = self._pids.get(name, info.pid)
        if before != info.pid:
            if name in self._silent:
                self._control.journal.add("lost", name, f"pid {before} has ended")
            self._control.journal.add("ready", name, f"pid {info.pid} at {info.http_url}")
        self._pids[name], self._silent[name] = info.pid, 0
        return info

    async def _start_again(self, name: str, actor_name: str) -> None:
        """Let Ray end it, and start it again."""
        del self._silent[name]
        reason = f"pid {self._pids[name]} has not answered {_MOST_SILENT} times, and is ended"
        self._control.journal.add("lost", name, reason)
        try:
            await ray_calls.start_again(await ray_calls.find_actor(actor_name, _INFO_TIMEOUT_S))
        except BatonError as error:
            self._control.journal.add("trouble", name, f"not ended: {error}")

    async def close_all(self) -> None:
        """Close every gateway, all at once; Unavailable, after all were tried, as for `ensure`."""
        handles = self._control.state.gateways.items()
        closing = (self._close(name, handle) for name, handle in handles)
        ended = await asyncio.gather(*closing, return_exceptions=True)
        for error in ended:
            if error is not None:
                raise error

    async def status(self) -> tuple[GatewayStatus, ...]:
        """Return how each is."""
        handles = sorted(self._control.state.gateways.items())
        return tuple(
            await asyncio.gather(*(self._status_of(n, handle.actor) for n, handle in handles))
        )

    async def _status_of(self, name: str, actor_name: str) -> GatewayStatus:
        try:
            return GatewayStatus(name, await self._info(name, actor_name))
        except BatonError as error:
            return GatewayStatus(name, None, str(error))

    async def _start(self, plan: GatewayPlan) -> None:
        actor = f"{plan.name}.{self._control.state.serial + 1}"
        handle = GatewayHandle(actor, revision_of(plan))
        await self._control.change(lambda state: _with_gateway(state, plan.name, handle))
        models = ", ".join(model.name for model in plan.models)
        self._control.journal.add("start", plan.name, f"wanted for {models}")
        await ray_calls.create_service(
            GatewayActor,
            plan,
            self._log_dir / f"{plan.name}.log",
            actor,
            name=actor,
            concurrency=CALLS_AT_ONCE,
            restarts=-1,
            timeout_s=_CREATE_TIMEOUT_S,
            node_resource=plan.node_resource,
        )

    async def _close(self, name: str, handle: GatewayHandle) -> None:
        """Let one go. It is forgotten once it has ended, and not because Ray did not say."""
        drain_s = self._control.state.spec.drain_timeout_s
        self._control.journal.add("drain", name, "wanted no more, or otherwise")
        try:
            actor = await ray_calls.find_actor(handle.actor, _CREATE_TIMEOUT_S)
        except InstanceLost:
            pass  # it has ended
        else:
            try:
                await ray_calls.call(actor, "close", drain_s, timeout_s=drain_s + _MARGIN_S)
            except BatonError as error:
                self._control.journal.add("trouble", name, f"not closed in order: {error}")
            await ray_calls.end(actor)
        self._pids.pop(name, None)
        self._silent.pop(name, None)
        await self._control.change(lambda state: _with_gateway(state, name, None))
        self._control.journal.add("gone", name, "closed")


async def _exists(actor: str) -> bool:
    try:
        await ray_calls.find_actor(actor, _CREATE_TIMEOUT_S)
    except InstanceLost:
        return False
    return True


def _with_gateway(state: ControlState, name: str, handle: GatewayHandle | None) -> ControlState:
    gateways = {n: known for n, known in state.gateways.items() if n != name}
    if handle is None:
        return replace(state, gateways=gateways)
    return replace(state, gateways={**gateways, name: handle}, serial=state.serial + 1)
