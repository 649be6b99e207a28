"""How much memory may still be taken, as the kernel says."""

from pathlib import Path

MIB = 1 << 20
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def available_memory() -> int:
    """Return the bytes that this process may still take: of the machine, or its cgroup if less."""
    found = [_machine(_MEMINFO.read_text())]
    limit, used = _read(_CGROUP / "memory.max"), _read(_CGROUP / "memory.current")
    if limit.isdigit() and used.isdigit():
        found.append(int(limit) - int(used))
    return max(0, min(found))


def _machine(meminfo: str) -> int:
    for line in meminfo.splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the kernel tells no MemAvailable")


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
