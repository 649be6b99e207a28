"""What `baton down` says when not everything could be ended."""

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from rich.console import Console

from baton.cli import up
from baton.cluster import ray_calls
from baton.cluster.lasting_head import Note
from baton.core.errors import Unavailable


async def test_what_could_not_be_ended_in_anothers_ray_is_not_said_to_be_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    killed: list[object] = []

    async def call(actor: object, *_: Any, timeout_s: float) -> None:
        raise Unavailable("Ray did not answer")

    async def kill(actor: object) -> None:
        killed.append(actor)

    @contextlib.asynccontextmanager
    async def attached(note: Note) -> AsyncIterator[up.Attached]:
        yield up.Attached(note, "controller")

    monkeypatch.setattr(up, "attached", attached)
    monkeypatch.setattr(ray_calls, "call", call)
    monkeypatch.setattr(ray_calls, "kill", kill)
    with pytest.raises(Unavailable, match="Ray did not answer"):
        await up.down(Note("a:1"), Console(quiet=True))
    assert killed == [], "the controller goes on, and can be asked again"
