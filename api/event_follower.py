"""Hears what every instance tells of itself, and tells the router's state."""

import asyncio

import grpc

from baton.core.config import ClusterTlsConfig
from baton.core.errors import BatonError, HandoverError
from baton.core.log import get_logger
from baton.core.topology import InstanceInfo, Membership, MembershipBoard
from baton.proto import events_pb2 as pb
from baton.proto.convert_events import changes_core, load_core, terms_core
from baton.proto.errors import from_rpc_error
from baton.proto.events_pb2_grpc import EventsStub
from baton.proto.grpc_runtime import open_channel
from baton.router.load import InstanceKey, key_of
from baton.router.state import RouterState

_FIRST_PAUSE_S = 0.25
_LONGEST_PAUSE_S = 10.0
"""Before a broken stream is opened again; it doubles while nothing is heard."""
_SILENCE_S = 10.0
"""Without a message, of which one comes each second, a stream is given up."""
_SWEEP_PAUSE_S = 0.005
"""Between two portions of tidying, which take about a millisecond each."""

_log = get_logger("events")
_Call = grpc.aio.UnaryStreamCall[pb.FollowRequest, pb.InstanceEvents]


class EventFollower:
    """Start `run()` as a task. A stream that is lost only makes the router blind to an instance."""

    def __init__(
        self, board: MembershipBoard, state: RouterState, tls: ClusterTlsConfig | None = None
    ) -> None:
        self._tls = tls
        self._board = board
        self._state = state
        self._tasks: dict[InstanceKey, asyncio.Task[None]] = {}
        self._untidy = asyncio.Event()

    def __repr__(self) -> str:
        return f"EventFollower(instances={len(self._tasks)})"

    async def run(self) -> None:
        """Follow the membership until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._tidy())
            version = -1
            while True:
                membership = await self._board.newer_than(version)
                version = membership.version
                self._follow(membership, group)

    def _follow(self, membership: Membership, group: asyncio.TaskGroup) -> None:
        listed = {key_of(i): i for i in membership.instances}
        for key in [key for key in self._tasks if key not in listed]:
            self._tasks.pop(key).cancel()
        for key, instance in listed.items():
            if key not in self._tasks:
                self._tasks[key] = group.create_task(self._keep(instance))

    async def _keep(self, instance: InstanceInfo) -> None:
        """Hold one stream after the other, until cancelled."""
        pause = _FIRST_PAUSE_S
        while True:
            heard = await self._hear_all(instance)
            pause = _FIRST_PAUSE_S if heard else min(2 * pause, _LONGEST_PAUSE_S)
            await asyncio.sleep(pause)

    async def _hear_all(self, instance: InstanceInfo) -> bool:
        """Hear an instance until its stream ends; return whether it told anything."""
        key, reason = key_of(instance), "it closed the stream"
        heard = False
        async with open_channel(instance.address, self._tls) as channel:
            request = pb.FollowRequest(incarnation=instance.incarnation)
            call: _Call = EventsStub(channel).Follow(request)
            try:
                while message := await self._next(call):
                    if not heard:
                        self._state.opened(key, terms_core(message))
                        heard = True
                    self._hear(key, message)
            except grpc.aio.AioRpcError as error:
                reason = from_rpc_error(error).message
            except TimeoutError:
                reason = f"it says nothing for {_SILENCE_S:g} s"
            except BatonError as error:
                reason = error.message
            except Exception as bug:  # it must not end the streams of the others
                _log.exception("bug in events", instance=instance.instance_id)
                reason = repr(bug)
            finally:
                call.cancel()
                if heard:
                    self._state.lost(key)
                    self._untidy.set()
        if heard:
            _log.warning("events lost", instance=instance.instance_id, reason=reason)
        return heard

    async def _next(self, call: _Call) -> pb.InstanceEvents | None:
        async with asyncio.timeout(_SILENCE_S):
            message = await call.read()
        return message if isinstance(message, pb.InstanceEvents) else None

    def _hear(self, key: InstanceKey, message: pb.InstanceEvents) -> None:
        """Pass a message on; raises HandoverError if one before it is missing."""
        for change in message.changes:
            if not self._state.changed(key, changes_core(change)):
                raise HandoverError("events are missing: begin anew")
            if change.complete:
                self._untidy.set()
        self._state.told(key, load_core(message))

    async def _tidy(self) -> None:
        """Take what is gone out of the index, a portion at a time."""
        while True:
            await self._untidy.wait()
            self._untidy.clear()
            while self._state.index.sweep():  # noqa: ASYNC110 (it works, and waits for nothing)
                await asyncio.sleep(_SWEEP_PAUSE_S)  # others have their turn
