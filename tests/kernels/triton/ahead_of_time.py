"""Compiles what launchers launch, for an H100 or H200 that need not be there.

A launcher is called with tensors on the `meta` device, which have a shape and no memory: that it
returns proves that it reads none. Each launch is compiled, and not made; the machine code tells its
registers, spills, shared memory, and which instructions it has.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
import triton.backends.nvidia as nvidia
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import JITFunction

SHARED_MEMORY = 232_448
"""Bytes that a program may have on Hopper: 227 KiB."""

_run = JITFunction.run
_TOOLS = Path(nvidia.__file__).parent / "bin"
_COUNTED = {
    "wgmma": r"\b[HQI]GMMA",
    "mma": r"\b[HQI]MMA",
    "async_copies": r"\bLDGSTS|\bUTMALDG",
    "wide_loads": r"\bLDG\S*\.128",
}

Fitness = dict[str, int]
"""registers, spills, shared memory in bytes, warps, and counts of instructions"""


class _Hopper(DriverBase):
    """What Triton asks a driver in order to compile; nothing can be launched with it."""

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_benchmarker(self) -> Callable[..., Any]:
        raise NotImplementedError("nothing can be timed without a GPU")


def fitness(launch: Callable[[], object]) -> dict[str, Fitness]:
    """Return what each kernel that `launch` launches is compiled to, by its place and its name.

    From then on nothing can be launched in this process.
    """
    found: list[tuple[str, Any]] = []

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        assert 0 < grid[0] < 2**31, f"{self.fn.__name__}: grid {grid}"
        assert all(0 < side < 2**16 for side in grid[1:]), f"{self.fn.__name__}: grid {grid}"
        compiled = _run(self, *args, grid=grid, warmup=True, **options)
        found.append((self.fn.__name__.strip("_"), compiled))

    triton.runtime.driver.set_active(_Hopper())
    JITFunction.run = compile_only
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        launch()
        return {f"{i} {name}": _inspect(compiled) for i, (name, compiled) in enumerate(found)}


@cache
def _inspect(compiled: Any) -> Fitness:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        Path(path).write_bytes(compiled.asm["cubin"])
        usage = _tool("cuobjdump", "--dump-resource-usage", path)
        code = _tool("nvdisasm", "-c", path)
    registers = re.search(r"\bREG:(\d+)", usage)
    assert registers is not None, usage
    return {
        "registers": int(registers[1]),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "shared": compiled.metadata.shared,
        "warps": compiled.metadata.num_warps,
    } | {name: len(re.findall(pattern, code)) for name, pattern in _COUNTED.items()}


def _tool(name: str, *args: str) -> str:
    run = subprocess.run([_TOOLS / name, *args], capture_output=True, text=True, check=True)
    return run.stdout
