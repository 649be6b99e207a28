"""What the Triton kernels compute, by Triton's interpreter against references in float64.

Each file of interpreted/ runs in a process of its own: whether a kernel is interpreted is decided
when it is defined, and must not be so for other tests.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton has wheels for Linux only")

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "name", sorted(path.name for path in (HERE / "interpreted").glob("test_*.py"))
)
def test_kernels_compute_what_the_reference_does(name: str):
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
    }
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            HERE / "interpreted" / name,
        ],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
