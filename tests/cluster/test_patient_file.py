"""Whoever writes to a disk that is stuck goes on; what was written comes when the disk does."""

import os
import threading
from collections.abc import Iterator

import pytest

from baton.cluster import patient_file
from baton.cluster.patient_file import PatientFile
from baton.core.clock import ManualClock


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """A pipe that nobody reads yet: a disk that takes so much and then stands still."""
    reading, writing = os.pipe()
    yield reading, writing
    os.close(reading)


def fill(writing: int) -> int:
    """Fill a pipe; return how much that took."""
    os.set_blocking(writing, False)
    taken = 0
    while True:
        try:
            taken += os.write(writing, b"x" * 4096)
        except BlockingIOError:
            os.set_blocking(writing, True)
            return taken


def read(reading: int, count: int) -> str:
    found = b""
    while len(found) < count:
        found += os.read(reading, count - len(found))
    return found.decode()


def test_a_line_is_written_once_write_returns(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patient_file, "_PATIENCE_S", 60.0)
    file = PatientFile(pipe[1])
    file.write("last ")
    print("words", file=file)
    os.set_blocking(pipe[0], False)
    assert os.read(pipe[0], 100) == b"last words\n"


def test_a_disk_that_stands_still_keeps_nobody_and_loses_nothing(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patient_file, "_PATIENCE_S", 0.01)
    taken = fill(pipe[1])
    file = PatientFile(pipe[1])
    lines = [f"line {i}\n" for i in range(1000)]
    for line in lines:
        file.write(line)
    read(pipe[0], taken)
    assert read(pipe[0], sum(map(len, lines))) == "".join(lines)
    file.write("and one more\n")
    assert read(pipe[0], 13) == "and one more\n"


def test_what_is_too_much_is_dropped_and_counted(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patient_file, "_PATIENCE_S", 0.01)
    monkeypatch.setattr(patient_file, "_KEPT_CHARACTERS", 10)
    taken = fill(pipe[1])
    file = PatientFile(pipe[1])
    for number in range(5):
        file.write(f"line {number}\n")
    read(pipe[0], taken)
    expected = "line 0\n[4 lines were dropped: the disk was too slow]\n"
    assert read(pipe[0], len(expected)) == expected


def test_a_disk_that_is_slow_has_a_tenth_of_its_writers_time(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, writing = ManualClock(), threading.Event()
    monkeypatch.setattr(patient_file, "_PATIENCE_S", 60.0)
    monkeypatch.setattr(patient_file, "monotonic", clock)

    def write(descriptor: int, data: bytes) -> None:
        writing.wait()
        clock.advance(0.2)
        os.write(descriptor, data)

    monkeypatch.setattr(patient_file, "_write", write)
    file = PatientFile(pipe[1])
    writing.set()
    print("it took 0.2 s to write this", file=file)
    writing.clear()
    print("nobody waits for this", file=file)
    print("or that", file=file)
    writing.set()
    expected = "it took 0.2 s to write this\nnobody waits for this\nor that\n"
    assert read(pipe[0], len(expected)) == expected
    clock.advance(2.0)
    print("but for this", file=file)
    os.set_blocking(pipe[0], False)
    assert os.read(pipe[0], 100) == b"but for this\n"
