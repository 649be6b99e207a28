"""The library is compiled once, kept, and done without where there is no compiler."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from baton.kernels.native import build as building
from baton.kernels.native.build import FLAGS, NoNativeCode, build, find_compiler

# Compiles in no time: what is tested is where the result goes.
TRIVIAL = 'extern "C" int answer() { return 42; }\n'


@pytest.fixture(autouse=True)
def compiler() -> str:
    try:
        return find_compiler()
    except NoNativeCode as error:
        pytest.skip(str(error))


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "step.cpp").write_text(TRIVIAL)
    monkeypatch.setattr(building, "SOURCES", folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


def test_a_library_that_is_there_is_used_again(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = build()
    assert path.parent == tmp_path / "cache" / "baton"
    first = path.stat()
    assert build() == path
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (first.st_ino, first.st_mtime_ns)
    assert list(path.parent.iterdir()) == [path], "nothing else is left behind"


def test_other_sources_flags_and_headers_are_other_libraries(sources: Path) -> None:
    paths = [build(), build((*FLAGS, "-DOTHER"))]
    (sources / "more.h").write_text("// a header\n")
    paths.append(build())
    (sources / "step.cpp").write_text(TRIVIAL.replace("42", "43"))
    paths.append(build())
    assert len(set(paths)) == 4


def test_two_processes_at_once(sources: Path, tmp_path: Path) -> None:
    """Both end with the whole library, whoever was first."""
    code = (
        "import ctypes, sys, pathlib\n"
        "from baton.kernels.native import build as building\n"
        "building.SOURCES = pathlib.Path(sys.argv[1])\n"
        "print(ctypes.CDLL(str(building.build())).answer())\n"
    )
    command = [sys.executable, "-c", code, str(sources)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=100)[0] for process in both] == ["42\n", "42\n"]
    assert len(list((tmp_path / "cache" / "baton").iterdir())) == 1


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(NoNativeCode, match="no C\\+\\+ compiler"):
        build()


def test_what_the_compiler_complains_of_is_told(sources: Path) -> None:
    (sources / "step.cpp").write_text("#error this cannot be\n")
    with pytest.raises(NoNativeCode, match="this cannot be"):
        build()


def test_a_compiler_that_fails(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'fatal error: out of luck' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(NoNativeCode, match="out of luck"):
        build()


def test_a_cache_that_others_may_write_to_is_not_trusted(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cache" / "baton"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    path = build()
    assert path.parent == tmp_path / f"baton-{os.getuid()}"
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    shutil.rmtree(path.parent)
    path.parent.mkdir(mode=0o777)
    path.parent.chmod(0o777)
    with pytest.raises(NoNativeCode, match="no folder"):
        build()
