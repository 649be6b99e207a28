"""Whether the Triton kernels fit an H100 or H200: compiled at production shapes, with no GPU.

The snapshot sm90.json holds what they need; `python -m tests.kernels.triton.compile --renew`
writes it anew after a change that is meant.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton has wheels for Linux only")

from tests.kernels.triton.ahead_of_time import SHARED_MEMORY
from tests.kernels.triton.compile import SNAPSHOT
from tests.kernels.triton.launches import LAUNCHES

ROOT = Path(__file__).resolve().parents[3]
FILES = sorted({name.partition("/")[0] for name in LAUNCHES})


@pytest.mark.timeout(600)
@pytest.mark.parametrize("file", FILES)
def test_kernels_fit_the_gpu(file: str):
    run = subprocess.run(
        [sys.executable, "-m", "tests.kernels.triton.compile", file],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    for launch, kernels in found.items():
        for kernel, fitness in kernels.items():
            assert fitness["spills"] == 0, f"{launch}, {kernel}: {fitness}"
            assert fitness["shared"] <= SHARED_MEMORY, f"{launch}, {kernel}: {fitness}"
    snapshot = json.loads(SNAPSHOT.read_text())
    assert found == {name: snapshot.get(name) for name in found}


def test_every_kernel_file_is_compiled_and_interpreted():
    folder = ROOT / "kernels" / "triton"
    launched = {path.stem for path in folder.glob("*.py") if "def _" in path.read_text()}
    with_launcher = {
        path.stem for path in folder.glob("*.py") if "num_warps=" in path.read_text()
    } - {"decode_plan", "decode_combine"}  # decode_attention launches them
    assert with_launcher <= launched
    assert with_launcher == set(FILES)
    tested = {path.stem for path in (Path(__file__).parent / "interpreted").glob("test_*.py")}
    assert {f"test_{name}" for name in FILES} == tested
