"""Kernels are compiled before the first step: none is missed, and no weight is read for it."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton has wheels for Linux only")

import torch
from triton.runtime.jit import JITFunction

from baton.core.config import EngineConfig
from baton.executor.gpu_compile import Wanted, take_steps
from baton.kernels.backend import Backend, using_backend
from baton.kernels.triton import ahead
from baton.models.share import Share
from baton.models.spec import read_spec
from baton.models.weights import Checkpoint
from baton.parallel.group import Ranks
from baton.parallel.shape_group import ShapeGroup
from tests.models.device_cases import FAMILIES, SIZES

ROOT = Path(__file__).resolve().parents[2]
CONFIG = EngineConfig(
    max_sequences=4, max_batch_tokens=64, cuda_graph_sizes=(1, 4), cuda_graph_tokens=(16,)
)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How often each kernel would have been launched."""
    found: Counter[str] = Counter()

    def run(self: Any, *args: Any, grid: Any, **options: Any) -> None:
        found[self.fn.__name__] += 1

    monkeypatch.setattr(JITFunction, "run", run)
    with using_backend(Backend.TRITON):
        yield found


def wanted(folder: Path, tp: int = 1) -> Wanted:
    spec = read_spec(folder)
    share = Share(Ranks(tp=ShapeGroup(tp - 1, tp)), scatter_from=32)
    return Wanted(folder, spec, CONFIG, share, share.kv(spec, 16, "float32").layout, 2)


@pytest.mark.timeout(900)
def test_what_is_compiled_ahead_is_all_that_is_launched(demo_model_dir: Path) -> None:
    """In a process of its own, in which nothing can be launched from then on."""
    environment = {key: os.environ[key] for key in os.environ.keys() - {"TRITON_INTERPRET"}}
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    ran = subprocess.run(
        [sys.executable, "-m", "tests.executor.compile_ahead", demo_model_dir],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    assert found["missed"] == []
    assert {"_skinny", "_rope_kv_write", "_attend", "_choose"} <= set(found["ahead"])
    assert found["said"][0] == f"compiled 8 kernels of {len(found['ahead'])} known so far"
    assert found["said"][-1].startswith(f"compiled {len(found['ahead'])} kernels in ")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_taken_through_its_steps_without_weights(
    family: str, tmp_path: Path, write_model: Callable[..., Path], launches: Counter[str]
) -> None:
    model_type, config = FAMILIES[family]
    take_steps(wanted(write_model(tmp_path, model_type, **(SIZES | config))))
    # Three of decodes, each in three extents, and two of chunks.
    assert launches["_choose"] == 3 * 2 + 2
    assert launches["_add_rms_norm"] > 0


def test_so_can_a_rank_whose_peers_are_not_there(
    tmp_path: Path, write_llama: Callable[..., Path], launches: Counter[str]
) -> None:
    folder = write_llama(tmp_path / "llama")
    take_steps(wanted(folder, tp=2))
    assert launches["_choose"] == 3 * 2 + 2


def test_nothing_is_read_of_tensors_without_memory(
    tmp_path: Path, write_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint(write_llama(tmp_path / "llama"), torch.bfloat16, "meta")
    name = "model.layers.0.self_attn.o_proj.weight"
    whole = checkpoint.take(name, 128, 128)
    part = checkpoint.take(name, 128, 128, cut=(slice(None), slice(64, 128)))
    assert whole.shape == (128, 128)
    assert part.shape == (128, 64)
    assert {whole.device.type, part.device.type} == {"meta"}
    assert {whole.dtype, part.dtype} == {torch.bfloat16}


def test_others_launch_while_one_context_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    made, before = list[tuple[str, bool]](), JITFunction.run
    monkeypatch.setattr(
        ahead, "_launch", lambda kernel, *args, grid, warmup: made.append((kernel, warmup))
    )
    with ThreadPoolExecutor(1) as other, ahead.compiling(1, lambda done, total: None):
        JITFunction.run("own", grid=(1,), warmup=False)  # type: ignore[arg-type]
        other.submit(JITFunction.run, "other", grid=(1,), warmup=False).result(20)  # type: ignore[arg-type]
    assert made == [("own", True), ("other", False)]
    assert JITFunction.run is before
