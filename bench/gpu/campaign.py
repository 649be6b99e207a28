"""Runs the stages one after the other, each in a process of its own and within a time of its own.

A stage that crashes, hangs or leaves the GPU unusable takes nothing with it: what it measured is
in the file, what befell it too, and the next stage starts afresh.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from bench.gpu.records import Records, is_complete
from bench.gpu.scale import SCALES

ROOT = Path(__file__).resolve().parents[2]
GRACE_S = 10.0
"""What a stage may take to end the case that is under way when its time is spent."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One part of the benchmark."""

    name: str
    module: str
    """Has `run(StageRun)`."""
    budget_s: float
    """Start of the process included."""
    what: str
    interpreted: bool = False
    """Whether it launches kernels by itself: without a GPU they are interpreted."""


STAGES = (
    Stage("ceilings", "bench.gpu.stages.ceilings", 40, "what the machine does at best", True),
    Stage("correctness", "bench.gpu.stages.correctness", 75, "logits beside transformers'"),
    Stage("kernels", "bench.gpu.stages.kernels", 130, "Triton kernels against their floors", True),
    Stage("decode", "bench.gpu.stages.decode", 110, "decode steps through the executor"),
    Stage("prefill", "bench.gpu.stages.prefill", 50, "prompts through the executor"),
    Stage("handover", "bench.gpu.stages.handover", 60, "prefill and decode in two processes"),
    Stage("transformers", "bench.gpu.stages.transformers_peer", 125, "transformers, side by side"),
)
"""With what stages may run over, together ten minutes."""


def run_stages(
    stages: tuple[Stage, ...], records: Records, out: Path, scale: str, minutes: float
) -> None:
    """Run the stages that are not complete, until all have run or the minutes are over."""
    end = time.perf_counter() + 60 * minutes
    for stage in stages:
        if is_complete(records.read(), stage.name):
            print(f"{stage.name}: complete already", flush=True)
            continue
        seconds = min(stage.budget_s, end - time.perf_counter() - GRACE_S)
        if seconds <= 0:
            records.add(stage.name, ended=f"not begun: the {minutes:g} minutes were spent")
            continue
        run_stage(stage, records, out, scale, seconds)


def run_stage(stage: Stage, records: Records, out: Path, scale: str, seconds: float) -> None:
    """Run one stage in a process of its own; record how it ended if it could not itself."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "bench.gpu.stage_process", stage.name, stage.module]
    command += ["--scale", scale, "--out", str(out), "--seconds", f"{seconds:.1f}"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=_environment(stage, scale), start_new_session=True
    )
    ended = ""
    try:
        status = process.wait(timeout=seconds + GRACE_S)
        if status != 0:
            ended = f"exit status {status}"
    except subprocess.TimeoutExpired:
        ended = f"killed after {seconds + GRACE_S:.0f} s"
    finally:
        # Its own processes too, should it have left any.
        _kill_group(process)
    if ended:
        records.add(stage.name, ended=ended, took_s=round(time.perf_counter() - began, 1))


def _environment(stage: Stage, scale: str) -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    found = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    if SCALES[scale].device == "cpu" and stage.interpreted:
        found |= {"TRITON_INTERPRET": "1"}
    return found


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
