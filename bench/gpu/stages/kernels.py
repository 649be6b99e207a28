"""Every Triton kernel at production shapes, beside the least bytes and operations it needs.

A kernel is launched on several sets of inputs in turn, in one CUDA graph: neither the L2 cache nor
the host takes part in the figure.
"""

from functools import partial
from typing import Any

from bench.gpu.attention_cases import attention_cases
from bench.gpu.clock import cache_bytes, input_sets, time_replays
from bench.gpu.kernel_case import KernelCase, Maker
from bench.gpu.linear_cases import linear_cases
from bench.gpu.stage_run import StageRun


def run(stage: StageRun) -> None:
    """Measure all of them, attention first."""
    maker = Maker(stage.device, stage.dtype)
    for kernel in (*attention_cases(stage.scale, maker), *linear_cases(stage.scale, maker)):
        stage.case(kernel.name, partial(_measure, stage, kernel))


def _measure(stage: StageRun, kernel: KernelCase) -> dict[str, Any]:
    sets = input_sets(kernel.work.bytes, cache_bytes(stage.device))
    calls = [kernel.make() for _ in range(sets)]
    found = time_replays(calls, stage.device, stage.scale.figure_s)
    work = {"bytes": kernel.work.bytes, "flops": kernel.work.flops}
    return work | {"sets": sets, "streams": kernel.weights, **found.figures()}
