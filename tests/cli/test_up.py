"""What `baton down` does and says when not everything could be ended."""

import contextlib
import io
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from baton.cli import up
from baton.cluster import lasting_head, ray_calls
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


async def test_a_ray_of_our_own_that_hangs_is_ended_all_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stopped: list[Note] = []

    async def stop(note: Note) -> None:
        stopped.append(note)

    @contextlib.asynccontextmanager
    async def attached(note: Note) -> AsyncIterator[up.Attached]:
        raise Unavailable("Ray did not answer within 30 s")
        yield

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(up, "attached", attached)
    monkeypatch.setattr(lasting_head, "stop", stop)
    monkeypatch.setattr(Note, "alive", lambda note: True)
    monkeypatch.setattr(ray_calls, "abandon_calls", lambda: None)  # it is for a process's end
    note = Note("a:1", guard=1)
    console = Console(record=True, file=io.StringIO())
    await up.down(note, console)
    assert stopped == [note]
    said = console.export_text()
    assert "not ended in order: Ray did not answer within 30 s" in said
    assert "nothing is left" in said
