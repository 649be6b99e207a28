"""Measures one GPU: what it can do, and what fraction of that Baton does; with no network.

    python -m bench.gpu                      all stages, ten minutes at most
    python -m bench.gpu --only decode,prefill --minutes 4
    python -m bench.gpu --report             the tables of what the file holds, nothing is run
    python -m bench.gpu --scale short        two layers and few cases: does all of it run here?
    python -m bench.gpu --scale tiny         tries the harness on a CPU: its figures mean nothing

Run it from the repo's root with a Python (3.11 or newer) that has torch 2.11 or newer with CUDA,
Triton 3.6, numpy, safetensors and xxhash; Baton need not be installed, nor what else it depends on.
transformers 5 is for the stages correctness and transformers, structlog for the row of kv_digest in
the kernel table; where one is missing that says so and is left out.
Every figure is appended to the file as soon as it is known. A run that is begun again with the same
file goes on where the last one ended, and tries again what failed; --fresh begins anew.
"""

import argparse
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.gpu.campaign import ROOT, STAGES, Stage, run_stages
from bench.gpu.records import Records
from bench.gpu.report import report
from bench.gpu.scale import SCALES


def main() -> None:
    """Run what was asked for, then print the report."""
    options = _arguments()
    out: Path = options.out or Path(f"gpu-{options.scale}.jsonl")
    records = Records(out)
    if not options.report:
        if options.fresh:
            out.unlink(missing_ok=True)
        _note_machine(records, options.scale)
        run_stages(options.only, records, out.resolve(), options.scale, options.minutes)
    print(report(records.read()))


def _note_machine(records: Records, scale: str) -> None:
    """Record what is measured; refuse to add to figures of anything else."""
    found = machine(scale)
    known = [r for r in records.read() if r["stage"] == "machine"]
    if not known:
        records.add("machine", **found)
    elif {key: known[0].get(key) for key in found} != found:
        sys.exit(f"{records} holds figures of {known[0]}, this is {found}: give another --out")


def machine(scale: str) -> dict[str, Any]:
    """Return what figures depend on: the device, the versions, the commit."""
    import torch

    device, memory = platform.machine(), 0
    if SCALES[scale].device != "cpu":
        if not torch.cuda.is_available():
            sys.exit("there is no CUDA device here; --scale tiny tries the harness without one")
        properties = torch.cuda.get_device_properties(0)
        device, memory = properties.name, properties.total_memory
    return {
        "scale": scale,
        "device": device,
        "memory": memory,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "commit": _commit(),
    }


def _commit() -> str:
    """Return the commit, with a plus if files differ from it; "unknown" outside a checkout."""
    commit = _git("rev-parse", "--short", "HEAD")
    if not commit:
        return "unknown"
    return commit + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")


def _git(*command: str) -> str:
    try:
        run = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return run.stdout.strip()


def _stages(text: str) -> tuple[Stage, ...]:
    names = text.split(",")
    known = {stage.name: stage for stage in STAGES}
    if unknown := [name for name in names if name not in known]:
        raise argparse.ArgumentTypeError(
            f"{', '.join(unknown)}: no such stage; there are {', '.join(known)}"
        )
    return tuple(known[name] for name in names)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="stages: " + "; ".join(f"{s.name}, {s.what} ({s.budget_s:g} s)" for s in STAGES),
    )
    parser.add_argument("--only", type=_stages, default=STAGES, help="stages, with commas between")
    parser.add_argument("--minutes", type=float, default=10.0, help="for all stages together")
    parser.add_argument("--out", type=Path, help="results (default: gpu-SCALE.jsonl)")
    parser.add_argument("--scale", choices=SCALES, default="full")
    parser.add_argument("--fresh", action="store_true", help="forget what the file holds")
    parser.add_argument("--report", action="store_true", help="only print the tables")
    return parser.parse_args()


if __name__ == "__main__":
    main()
