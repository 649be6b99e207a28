"""The note by which commands find the Ray cluster that an earlier one made."""

import asyncio
import os
import stat
from pathlib import Path

import pytest

from baton.cluster import lasting_head
from baton.cluster.lasting_head import Note
from baton.core.errors import InvalidConfig

PATIENCE_S = 120.0


def test_a_note_is_read_by_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "state" / "baton" / "cluster.json"
    assert Note.read(path) is None
    note = Note("127.0.0.1:6379", "secret", 7, "/tmp/x")
    for _ in range(2):
        note.write(path)
        assert Note.read(path) == note
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(path.parent) == ["cluster.json"]


@pytest.mark.parametrize("text", ["", "{}", '{"address": "a", "more": 1}', "[]"])
def test_a_note_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "cluster.json"
    path.write_text(text)
    with pytest.raises(InvalidConfig, match=r"what `baton up` wrote"):
        Note.read(path)


def test_a_head_that_has_ended_is_known_to_have() -> None:
    assert Note("a:1").alive(), "who can tell"
    assert not Note("a:1", "secret", guard=2**22 + 1).alive()
    session = os.getsid(0)
    assert Note("a:1", "secret", guard=session).alive()


async def test_a_start_that_is_called_off_leaves_no_ray(short_temp_dir: Path) -> None:
    temp_dir = short_temp_dir / "ray"
    temp_dir.mkdir()
    starting = asyncio.create_task(
        lasting_head.start(temp_dir, slots=1, threads=1, timeout_s=PATIENCE_S)
    )
    async with asyncio.timeout(PATIENCE_S):
        while not (temp_dir / "head.log").exists():  # noqa: ASYNC110  (another process writes it)
            await asyncio.sleep(0.01)
        starting.cancel()
        await asyncio.wait({starting})
        assert starting.cancelled()
        while temp_dir.exists():  # noqa: ASYNC110  (the guard removes it last of all)
            await asyncio.sleep(0.01)
