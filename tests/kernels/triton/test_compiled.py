"""Whether the Triton kernels fit an H100 or H200: compiled at production shapes, with no GPU.

The snapshot sm90.json holds what they need; `python -m tests.kernels.triton.compile --renew`
writes it anew after a change that is meant.
"""

import json
from importlib.metadata import version
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton has wheels for Linux only")

from tests.kernels.triton.ahead_of_time import SHARED_MEMORY, Fitness
from tests.kernels.triton.compile import SNAPSHOT
from tests.kernels.triton.conftest import Runs
from tests.kernels.triton.launches import LAUNCHES

TRITON = "3.6.0"
"""The version that the snapshot is of, and the tiles were chosen for; others compile to other code,
of which some spills registers."""
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def found(runs: Runs) -> dict[str, dict[str, Fitness]]:
    """What every launch is compiled to."""
    status, out, err = runs.result("compile")
    assert status == 0, err
    launches: dict[str, dict[str, Fitness]] = json.loads(out)
    return launches


@pytest.mark.timeout(900)
@pytest.mark.parametrize("launch", LAUNCHES)
def test_a_launch_fits_the_gpu(launch: str, found: dict[str, dict[str, Fitness]]):
    for kernel, fitness in found[launch].items():
        assert fitness["shared"] <= SHARED_MEMORY, f"{kernel}: {fitness}"
    if version("triton") == TRITON:
        assert not any(fitness["spills"] for fitness in found[launch].values()), found[launch]
        assert found[launch] == json.loads(SNAPSHOT.read_text()).get(launch)


def test_the_snapshot_has_no_launch_that_is_gone():
    assert json.loads(SNAPSHOT.read_text()).keys() == LAUNCHES.keys()


def test_every_launcher_is_compiled_and_interpreted():
    shared = {"decode_plan", "decode_combine"}  # launched by decode_attention and mla_decode
    paths = (ROOT / "kernels" / "triton").glob("*.py")
    launchers = {path.stem for path in paths if "num_warps=" in path.read_text()} - shared
    assert launchers == {name.partition("/")[0] for name in LAUNCHES}
    tested = (Path(__file__).parent / "interpreted").glob("test_*.py")
    assert launchers == {path.stem.removeprefix("test_") for path in tested}
