"""`baton doctor`: what is here, what will be used, and why."""

import importlib
import importlib.metadata
import platform
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from baton import __version__
from baton.cli import machine
from baton.cli.defaults import DEMO_MODEL
from baton.core.memory import MIB, available_memory
from baton.kernels.backend import Backend, choose_backend
from baton.kernels.native.build import NoNativeCode
from baton.kernels.native.library import load_library
from baton.kv_transfer.ucx.capabilities import UcxCapabilities, describe
from baton.kv_transfer.ucx.config import UcxConfig
from baton.models.spec import read_spec

GIB = 1 << 30
LEAST_MEMORY = 2 * GIB
"""Ray, the gateway and two instances of the demo model take about that much together."""
LEAST_SHM = 128 * MIB
LEAST_DISK = GIB
PAGE = "docs/doctor.md"
"""In the repo, and on the site that `make docs` builds; it has a section for each check."""


class Verdict(StrEnum):
    """How a finding is to be read; the value is its colour."""

    GOOD = "green"
    NOTE = "yellow"
    BAD = "red"


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check has found."""

    here: str
    """What is here."""
    use: str
    """What will be used and why, or what to do about it."""
    verdict: Verdict = Verdict.GOOD


def page_of(what: str) -> str:
    """Return where the documentation tells of a check: its section has the check's name."""
    words = re.sub(r"[^\w\s-]", "", what.lower())
    return f"{PAGE}#{words.replace(' ', '-')}"


def examine() -> Iterator[tuple[str, Finding]]:
    """Yield what each check is called and what it finds; takes seconds, for importing torch."""
    for what, check in _CHECKS.items():
        try:
            yield what, check()
        except Exception as error:
            yield what, Finding(f"{type(error).__name__}: {error}", _REINSTALL, Verdict.BAD)


_REINSTALL = "Baton cannot run like this; run `make setup` again"


def report(console: Console) -> bool:
    """Print all findings, each with its page; return whether Baton can run here."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title, width in (("", 13), ("here", 40), ("used, and why", 43)):
        table.add_column(title, width=width, overflow="fold")
    findings = list(examine())
    for what, found in findings:
        sign = {Verdict.GOOD: "✓", Verdict.NOTE: "!", Verdict.BAD: "✗"}[found.verdict]
        named = f"[{found.verdict.value}]{sign}[/] {_linked(what, page_of(what))}"
        more = "" if found.verdict is Verdict.GOOD else f"\n→ {page_of(what)}"
        used = Text(f"{found.use}{more}", style=found.verdict.value)
        table.add_row(named, Text(found.here), used)
    console.print(f"Baton {__version__}\n", style="bold")
    console.print(table)
    usable = all(found.verdict is not Verdict.BAD for _, found in findings)
    console.print("\nBaton can run here." if usable else "\nBaton cannot run here: see ✗ above.")
    console.print(f"What each line means, and what to do: {PAGE}", highlight=False)
    return usable


def _linked(what: str, page: str) -> str:
    """Let a terminal that can do so open the section, where the documentation is at hand."""
    folder = DEMO_MODEL.resolve().parents[1]
    if not (folder / PAGE).is_file():
        return what
    return f"[link={(folder / PAGE).as_uri()}#{page.partition('#')[2]}]{what}[/link]"


def _python() -> Finding:
    return Finding(platform.python_version(), sys.executable)


def _cores() -> Finding:
    cores = machine.cpu_cores()
    if cores < 2:
        use = "one core for all processes: it works, slowly"
        return Finding(str(cores), use, Verdict.NOTE)
    return Finding(str(cores), "one thread per instance unless --threads says more")


def _memory() -> Finding:
    free = available_memory()
    here = f"{free / GIB:.1f} GiB available"
    if free < LEAST_MEMORY:
        use = f"{LEAST_MEMORY // GIB} GiB are needed for Ray and two instances: free some"
        return Finding(here, use, Verdict.BAD)
    return Finding(here, "each instance: its weights and --kv-memory-mib of KV")


def _shared_memory() -> Finding:
    free = machine.free_space(Path("/dev/shm"))
    here = f"{free // MIB} MiB free"
    if free < LEAST_SHM:
        use = "Ray wants 128 MiB: it goes to disk instead (docker run --shm-size=1g)"
        return Finding(here, use, Verdict.NOTE)
    return Finding(here, "80 MB of it, for Ray's object store")


def _temp_dir() -> Finding:
    folder = Path(tempfile.gettempdir())
    free = machine.free_space(folder)
    here = f"{folder}: {free / GIB:.1f} GiB free"
    if free < LEAST_DISK:
        return Finding(here, "1 GiB should be free for Ray's files", Verdict.NOTE)
    return Finding(here, "for Ray's files and all logs, while it runs")


def _gpus() -> Finding:
    cards = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    names = [_gpu_name(card) for card in cards]
    if names:
        use = "one, for an instance of one rank; see GPU kernels"
        return Finding(", ".join(names), use, Verdict.NOTE)
    return Finding("no NVIDIA GPU", "the CPU")


def _gpu_name(information: Path) -> str:
    for line in information.read_text().splitlines():
        if line.startswith("Model:"):
            return line.partition(":")[2].strip()
    return "NVIDIA GPU"


def _torch() -> Finding:
    torch = importlib.import_module("torch")
    capability = torch.backends.cpu.get_cpu_capability()
    return Finding(str(torch.__version__), f"on the CPU, with {capability} instructions")


def _native() -> Finding:
    """Compile the native executor, if it was not yet: then the first start is as fast as any."""
    try:
        library = load_library()
    except NoNativeCode as error:
        use = "torch computes, several times slower; install g++ or clang++ for native code"
        return Finding(str(error), use, Verdict.NOTE)
    use = f"native code{', with AMX in bfloat16' * library.amx}"
    return Finding(f"compiled for {library.instructions}", use)


def _kernels() -> Finding:
    """What an executor on a GPU computes with, or would."""
    torch = importlib.import_module("torch")
    choice = choose_backend("cuda")
    if not torch.cuda.is_available():
        return Finding(choice.backend, "unused: torch finds no CUDA device here")
    verdict = Verdict.GOOD if choice.backend is Backend.TRITON else Verdict.NOTE
    return Finding(choice.backend, choice.why, verdict)


def _ray() -> Finding:
    importlib.import_module("ray")
    version = importlib.metadata.version("ray")
    return Finding(version, "a head of our own on 127.0.0.1, gone when Baton ends")


def _ucx() -> Finding:
    found = _describe_ucx()
    here = f"{found.version}, {found.library}: {', '.join(found.transports)}"
    if found.moves_cuda:
        here += f"; memory of GPUs by {', '.join(found.cuda_transports)}"
    use = "for RDMA between machines, or if it is asked for; else KV goes by shm and TCP"
    return Finding(here, use)


def _rdma() -> Finding:
    found = _describe_ucx()
    if found.has_verbs:
        return Finding("found by UCX", "between machines")
    devices = sorted(path.name for path in Path("/sys/class/infiniband").glob("*"))
    if devices:
        use = "not by this UCX, which has no verbs: install a system UCX for RDMA"
        return Finding(", ".join(devices), use, Verdict.NOTE)
    return Finding("no device", "TCP between machines")


def _other_processes() -> Finding:
    scope = machine.ptrace_scope()
    yama = "no Yama" if scope is None else f"ptrace_scope {scope}"
    if machine.may_read_other_processes():
        use = "UCX, if asked for, reads through the kernel within a host"
        return Finding(f"allowed ({yama})", use)
    use = "UCX, if asked for, reads over TCP; sudo sysctl kernel.yama.ptrace_scope=0 allows it"
    return Finding(f"not allowed ({yama})", use, Verdict.NOTE)


def _demo_model() -> Finding:
    spec = read_spec(DEMO_MODEL)
    here = f"{spec.layers} layers, {spec.max_position} tokens"
    return Finding(here, "unless `baton serve --model` names another")


def _describe_ucx() -> UcxCapabilities:
    """Ask about all interfaces, not only the loopback that a single machine needs."""
    return describe(UcxConfig(host="0.0.0.0"))


_CHECKS: dict[str, Callable[[], Finding]] = {
    "Python": _python,
    "CPU cores": _cores,
    "memory": _memory,
    "/dev/shm": _shared_memory,
    "temp folder": _temp_dir,
    "GPUs": _gpus,
    "torch": _torch,
    "executor": _native,
    "GPU kernels": _kernels,
    "Ray": _ray,
    "UCX": _ucx,
    "RDMA": _rdma,
    "cma": _other_processes,
    "demo model": _demo_model,
}
