from pathlib import Path

import pytest

from baton.core import memory


def test_this_machine_has_some() -> None:
    assert 0 < memory.available_memory() < 1 << 60


@pytest.mark.parametrize(
    ("limit", "used", "expected"),
    [("max", "5", 4096 << 10), (str(2 << 20), str(1 << 20), 1 << 20), ("10", "20", 0)],
    ids=["no limit", "the cgroup's limit", "over the limit"],
)
def test_the_smaller_of_machine_and_cgroup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, used: str, expected: int
) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9999 kB\nMemAvailable:    4096 kB\n")
    (tmp_path / "memory.max").write_text(limit + "\n")
    (tmp_path / "memory.current").write_text(used + "\n")
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert memory.available_memory() == expected
