"""The note by which commands find the Ray cluster that an earlier one made."""

import os
import stat
from pathlib import Path

import pytest

from baton.cluster.lasting_head import Note
from baton.core.errors import InvalidConfig


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
