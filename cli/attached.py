"""How commands find the cluster that `baton up` made, and its controller."""

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baton.cluster import ray_calls, ray_environment
from baton.cluster.controller_actor import CALLS_AT_ONCE, ControllerActor
from baton.cluster.journal import Event
from baton.cluster.lasting_head import Note
from baton.cluster.names import CONTROLLER
from baton.cluster.surroundings import FACTORIES
from baton.core.errors import DeadlineExceeded, InstanceLost, InvalidConfig, Unavailable
from baton.core.topology import Role

CALL_TIMEOUT_S = 60.0
_CONNECT_TIMEOUT_S = 30.0
_LEAVE_TIMEOUT_S = 10.0
_CREATE_TIMEOUT_S = 15.0
_RETURN_TIMEOUT_S = 120.0
_RETURN_PAUSE_S = 0.5
"""For a controller that has ended to be there again."""


def note_path() -> Path:
    """Return where the note of this user's cluster lies, by the XDG rules."""
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "baton" / "cluster.json"


def found_note(address: str) -> Note:
    """Return how to attach; `address` if one is given, else what the note says.

    Raises InvalidConfig if there is no note, Unavailable if the head that it names has ended.
    """
    note = Note.read(note_path())
    if address and (note is None or note.address != address):
        return Note(address)
    if note is None:
        allowed = "one, where `baton up` has not started a Ray cluster itself"
        raise InvalidConfig("--address", None, allowed)
    if not note.alive():
        raise Unavailable(f"Ray at {note.address} has ended; `baton up` starts it again")
    return note


@dataclass(frozen=True, slots=True)
class Attached:
    """A connection to Ray, and perhaps a controller."""

    note: Note
    actor: Any
    """The controller; None if there is none."""

    async def call(self, method: str, *arguments: Any, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        """Call the controller; raises what it raises, Unavailable if there is none."""
        if self.actor is None:
            raise Unavailable("nothing is up here; `baton up` starts it")
        return await ray_calls.call(self.actor, "ask", method, *arguments, timeout_s=timeout_s)

    async def events(
        self, after: int, wait_s: float
    ) -> AsyncGenerator[tuple[tuple[Event, ...], bool]]:
        """Yield what came after the event of that number, and what comes: once per `wait_s`.

        Each time with whether everything is as it is wanted. If the controller ends, the next one's
        events follow. Raises Unavailable if there is none any more, or none that answers.
        """
        while True:
            try:
                events, settled = await self.call("events", after, wait_s)
            except (InstanceLost, DeadlineExceeded):
                await self._until_answered()
                after = 0
                continue
            if events:
                after = events[-1].number
            yield events, settled

    async def _until_answered(self) -> None:
        """Wait until a controller answers again, which Ray starts wherever it can."""
        try:
            async with asyncio.timeout(_RETURN_TIMEOUT_S):
                while True:
                    await asyncio.sleep(_RETURN_PAUSE_S)
                    try:
                        await ray_calls.find_actor(CONTROLLER, _CREATE_TIMEOUT_S)
                    except InstanceLost:
                        raise Unavailable("the controller has ended for good") from None
                    try:
                        await self.call("events", 0, 0.0)
                    except (InstanceLost, DeadlineExceeded):
                        continue
                    return
        except TimeoutError:
            text = f"the controller was away for {_RETURN_TIMEOUT_S:g} s"
            raise Unavailable(text) from None


@contextlib.asynccontextmanager
async def attached(note: Note) -> AsyncIterator[Attached]:
    """Connect to Ray, and look for the controller; leave in the end."""
    ray_environment.use_token(note.token)
    try:
        await ray_calls.connect(note.address, _CONNECT_TIMEOUT_S)
        try:
            actor = await ray_calls.find_actor(CONTROLLER, _CREATE_TIMEOUT_S)
        except InstanceLost:
            actor = None
        yield Attached(note, actor)
    finally:
        await asyncio.shield(ray_calls.disconnect(_LEAVE_TIMEOUT_S))


async def with_controller(
    cluster: Attached, log_dir: Path, factories: Mapping[Role, str] = FACTORIES
) -> Attached:
    """Return a cluster that has a controller, which Ray starts again whenever it ends."""
    if cluster.actor is not None:
        return cluster
    actor = await ray_calls.create_service(
        ControllerActor,
        log_dir,
        dict(factories),
        name=CONTROLLER,
        concurrency=CALLS_AT_ONCE,
        restarts=-1,
        timeout_s=_CREATE_TIMEOUT_S,
        beside_head=True,
    )
    return Attached(cluster.note, actor)
