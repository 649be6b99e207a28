"""Whether the Triton kernels fit an H100 or H200: compiled at production shapes, with no GPU.

The snapshot sm90.json holds what they need; `python -m tests.kernels.triton.compile --renew`
writes it anew after a change that is meant.
"""

import json
from importlib.metadata import version
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton has wheels for Linux only")

from tests.kernels.triton.ahead_of_time import Fitness
from tests.kernels.triton.compile import SNAPSHOT
from tests.kernels.triton.conftest import LIMIT_S, Runs
from tests.kernels.triton.differences import RENEW, differences, faults
from tests.kernels.triton.launches import LAUNCHES, MODELS

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


@pytest.mark.timeout(LIMIT_S + 100)
@pytest.mark.parametrize("launch", LAUNCHES)
def test_a_launch_fits_the_gpu(launch: str, found: dict[str, dict[str, Fitness]]):
    same_compiler = version("triton") == TRITON
    wrong = faults(found[launch], spills=same_compiler)
    if same_compiler:
        wrong += differences(json.loads(SNAPSHOT.read_text()).get(launch, {}), found[launch])
    assert not wrong, "\n".join([launch, *wrong, RENEW])


PLAIN = {
    "registers": 116,
    "spills": 0,
    "shared": 39424,
    "warps": 4,
    "wgmma": 0,
    "mma": 32,
    "async_copies": 80,
    "wide_loads": 33,
}


def test_a_planted_spill_is_shown_with_all_else_that_it_changed():
    worse = PLAIN | {"registers": 255, "spills": 40, "mma": 0, "wgmma": 8, "async_copies": 0}
    assert differences({"0 attend": PLAIN}, {"0 attend": PLAIN}) == []
    assert differences({"0 attend": PLAIN}, {"0 attend": worse}) == [
        "0 attend: registers 116 → 255, spills 0 → 40, wgmma 0 → 8, mma 32 → 0, async_copies 80 → 0"
    ]
    assert faults({"0 attend": worse}, spills=True) == ["0 attend: spills 40, at most 0"]
    assert faults({"0 attend": worse}, spills=False) == []


def test_shared_memory_over_what_there_is_is_a_fault_with_any_compiler():
    assert faults({"0 attend": PLAIN | {"shared": 232_449}}, spills=False) == [
        "0 attend: shared 232449, at most 232448"
    ]


def test_kernels_that_come_and_go_are_shown():
    found = differences({"0 plan": PLAIN}, {"0 attend": {"registers": 7, "spills": 0}})
    assert found == ["0 plan: is launched no more", "0 attend: is new, registers 7, spills 0"]


@pytest.mark.parametrize("model", sorted(MODELS))
def test_a_model_in_production_is_compiled_whole(model: str):
    """Whatever kernel a step of the model launches is compiled at the model's own sizes."""
    missing = [
        kernel
        for kernel, case in MODELS[model].items()
        if not any(name.startswith(f"{kernel}/{case}") for name in LAUNCHES)
    ]
    assert not missing, f"{model}: {missing}"


def test_the_snapshot_has_no_launch_that_is_gone():
    assert json.loads(SNAPSHOT.read_text()).keys() == LAUNCHES.keys()


def test_every_launcher_is_compiled_and_interpreted():
    shared = {"decode_plan", "decode_combine"}  # launched by decode_attention and mla_decode
    paths = (ROOT / "kernels" / "triton").glob("*.py")
    launchers = {path.stem for path in paths if "num_warps=" in path.read_text()} - shared
    assert launchers == {name.partition("/")[0] for name in LAUNCHES}
    tested = (Path(__file__).parent / "interpreted").glob("test_*.py")
    assert launchers == {path.stem.removeprefix("test_") for path in tested}
