"""What this machine has, asked of the kernel."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path


def cpu_cores() -> int:
    """Return the cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def free_space(folder: Path) -> int:
    """Return the free bytes of the file system of `folder`; 0 if there is none."""
    try:
        usage = os.statvfs(folder)
    except OSError:
        return 0
    return usage.f_bavail * usage.f_frsize


def ptrace_scope() -> int | None:
    """Return the kernel's Yama setting, or None without Yama.

    From 1 on, a process may read another's memory only if it is its descendant or was allowed to
    by it; UCX's cma transport reads that way between processes of one user.
    """
    text = _read(Path("/proc/sys/kernel/yama/ptrace_scope"))
    return int(text) if text.isdigit() else None


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def may_read_other_processes() -> bool:
    """Try whether a process may read the memory of one that is not its descendant, as UCX would.

    A child tries to read one byte of ours by process_vm_readv.
    """
    probe = ctypes.create_string_buffer(b"x")
    script = (
        "import ctypes, os, sys\n"
        "class V(ctypes.Structure):\n"
        "    _fields_ = [('base', ctypes.c_void_p), ('len', ctypes.c_size_t)]\n"
        "own = ctypes.create_string_buffer(1)\n"
        "read = ctypes.CDLL(None).process_vm_readv\n"
        "l, r = V(ctypes.addressof(own), 1), V(int(sys.argv[1]), 1)\n"
        "n = read(os.getppid(), ctypes.byref(l), 1, ctypes.byref(r), 1, 0)\n"
        "sys.exit(0 if n == 1 and own.raw == b'x' else 1)\n"
    )
    command = [sys.executable, "-c", script, str(ctypes.addressof(probe))]
    done = subprocess.run(command, capture_output=True, timeout=30, check=False)
    return done.returncode == 0
