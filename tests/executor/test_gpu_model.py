"""What is captured reads nothing on the host, from a step's rows to its tokens, at 8B's size."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton has wheels for Linux only")

from triton.runtime.jit import JITFunction

from baton.executor.gpu_model import GpuModel, RaggedStep
from baton.executor.gpu_option_tensors import OptionTensors
from baton.executor.gpu_options import Extent
from baton.executor.gpu_seats import SeatTensors
from baton.executor.kv_cache import KVCache
from baton.kernels.backend import Backend, using_backend
from baton.models.decoder import Decoder
from baton.models.spec import read_spec
from tests.models.meta_checkpoint import MetaCheckpoint
from tests.models.test_decoder_on_meta import LLAMA_8B

META = torch.device("meta")


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How often each kernel would have been launched."""
    found: Counter[str] = Counter()

    def run(self: Any, *args: Any, grid: tuple[int, ...], **options: Any) -> None:
        found[self.fn.__name__] += 1
        found["skipping"] += bool(options.get("SKIPPING"))

    monkeypatch.setattr(JITFunction, "run", run)
    with using_backend(Backend.TRITON):
        yield found


@pytest.fixture(params=[0.0, 1e-4], ids=["all keys", "skipping"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> GpuModel:
    fields = {name: value for name, value in LLAMA_8B.items() if value}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    spec = read_spec(tmp_path)
    decoder = Decoder(spec, MetaCheckpoint(), dtype="bfloat16", threads=1)
    kv = KVCache(spec.kv_layout(16, "bfloat16"), 4096, "meta")
    options = OptionTensors(768, spec.vocab_size, META)
    rows, state = numbers(3, 256), SeatTensors(768, 512, META)
    return GpuModel(decoder, kv, state, rows, options, skip_below=request.param)


def numbers(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int64, device=META)


@pytest.mark.parametrize("extent", list(Extent))
@pytest.mark.parametrize("rows", [1, 256])
def test_a_step_of_decodes_and_its_sampling(
    model: GpuModel, launches: Counter[str], rows: int, extent: Extent
) -> None:
    with torch.inference_mode():
        model.decode(rows, extent)
    assert launches["_change"] == (extent is not Extent.PLAIN)
    assert launches["_plan"] == 1
    by_kernels = int(extent is not Extent.TYPICAL)
    assert launches["_cuts"] == launches["_race"] == launches["_choose"] == by_kernels
    assert launches["_rope_kv_write"] == 32


def test_a_step_with_chunks_of_prompts(
    request: pytest.FixtureRequest, model: GpuModel, launches: Counter[str]
) -> None:
    tokens, sequences = 8 + 5000, 10
    ragged = RaggedStep(
        *(numbers(tokens) for _ in range(3)),
        *(numbers(sequences) for _ in range(2)),
        starts=numbers(3),
        sampled=numbers(9),
        decodes=8,
        chunks=((4000, 4000), (1000, 7000)),
    )
    with torch.inference_mode():
        rows = model.ragged_logits(ragged, None)
        model.choose(rows, Extent.TOLD)
    assert rows.logits.shape == (9, 128256)
    assert rows.seats.shape == rows.positions.shape == (9,)
    assert launches["_choose"] == 1
    assert launches["skipping"] == (32 if request.node.callspec.params["model"] else 0)
