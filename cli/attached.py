"""How commands find the cluster that `baton up` made, and its controller."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baton.cluster import ray_calls
from baton.cluster.control import FACTORIES
from baton.cluster.controller_actor import CALLS_AT_ONCE, ControllerActor
from baton.cluster.lasting_head import Note
from baton.cluster.names import CONTROLLER
from baton.core.errors import InstanceLost, InvalidConfig, Unavailable
from baton.core.topology import Role

CALL_TIMEOUT_S = 60.0
_CONNECT_TIMEOUT_S = 30.0
_LEAVE_TIMEOUT_S = 10.0
_CREATE_TIMEOUT_S = 15.0


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


@contextlib.asynccontextmanager
async def attached(note: Note) -> AsyncIterator[Attached]:
    """Connect to Ray, and look for the controller; leave in the end."""
    ray_calls.use_token(note.token)
    await ray_calls.connect(note.address, _CONNECT_TIMEOUT_S)
    try:
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
