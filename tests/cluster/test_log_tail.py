"""The end of a log is read without waiting for its disk."""

import asyncio
import os
from pathlib import Path

import pytest

from baton.cluster import log_tail
from baton.cluster.log_tail import tail_of


async def test_the_last_lines_of_a_long_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("".join(f"line {i}\n" for i in range(20_000)))
    assert await tail_of(log, 2) == ["line 19998", "line 19999"]
    log.write_text("one\n")
    assert await tail_of(log, 2) == ["one"]


async def test_no_log_and_one_that_cannot_be_read(tmp_path: Path) -> None:
    assert await tail_of(tmp_path / "none", 5) == []
    assert await tail_of(tmp_path, 5) == [f"({tmp_path} cannot be read: Is a directory)"]


async def test_a_disk_that_stands_still_keeps_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_tail, "_PATIENCE_S", 0.01)
    log = tmp_path / "log"
    os.mkfifo(log)  # whoever opens it to read waits until somebody writes
    reading = asyncio.create_task(tail_of(log, 5))
    assert await reading == [f"({log} could not be read in 0.01 s)"]
    os.close(os.open(log, os.O_RDWR))
