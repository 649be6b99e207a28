"""Compiles the C++ sources of this folder for the processor at hand, once, and keeps the result.

The library's name is a hash of all that it depends on: sources, flags, compiler and processor. So
a new version of Baton or another machine with the same home never gets a library that is not its
own. Compiling takes some seconds; loading what is there, milliseconds.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

SOURCES = Path(__file__).parent
FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-shared",
    "-fPIC",
    "-pthread",
)
COMPILERS = ("g++", "c++", "clang++")
"""Tried in this order, after the one that the environment variable CXX names."""
_TIMEOUT_S = 300.0
_SHOWN = 200


class NoNativeCode(Exception):
    """There is no library to be had; the text says why."""


def build(flags: Sequence[str] = FLAGS, source: str = "step.cpp") -> Path:
    """Return the path of the library that a source of this folder makes, compiled now or earlier.

    Raises NoNativeCode without a compiler, if it fails, or with nowhere to put the library.
    """
    compiler = find_compiler()
    folder = _cache_folder()
    path = folder / f"native-{_key(compiler, flags, source)}.so"
    if not path.is_file():
        _compile(compiler, flags, SOURCES / source, path)
    return path


def find_compiler() -> str:
    """Return the path of a C++ compiler; raises NoNativeCode if there is none."""
    for name in (os.environ.get("CXX"), *COMPILERS):
        if name and (found := shutil.which(name)):
            return found
    raise NoNativeCode("no C++ compiler found")


def _key(compiler: str, flags: Sequence[str], source: str) -> str:
    digest = hashlib.sha256()
    for path in sorted([*SOURCES.glob("*.h"), *SOURCES.glob("*.cpp")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    version = _run([compiler, "--version"])
    digest.update(repr((version, tuple(flags), source, platform.machine(), _processor())).encode())
    return digest.hexdigest()[:24]


def _processor() -> str:
    """Return what tells processors apart whose instructions differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _cache_folder() -> Path:
    """Return a folder that is ours alone: what lies there is loaded and run."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    temporary = Path(tempfile.gettempdir()) / f"baton-{os.getuid()}"
    for folder in (Path(home) / "baton", temporary):
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = folder.stat()
        except OSError:
            continue
        if found.st_uid == os.getuid() and not found.st_mode & 0o022 and os.access(folder, os.W_OK):
            return folder
    raise NoNativeCode(f"no folder for compiled code: neither {home}/baton nor {temporary}")


def _compile(compiler: str, flags: Sequence[str], source: Path, path: Path) -> None:
    """Compile to a file of this process alone, then rename: others see all of it or nothing."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix="compiling-", suffix=".so")
    os.close(handle)
    try:
        _run([compiler, *flags, "-o", name, str(source)])
        os.replace(name, path)
    except OSError as error:
        raise NoNativeCode(f"{path.parent}: {error}") from None
    finally:
        Path(name).unlink(missing_ok=True)


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoNativeCode(f"{command[0]} did not run: {error}") from None
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr)
        raise NoNativeCode(f"{command[0]} failed: {said.strip()[:_SHOWN]}")
    return done.stdout
