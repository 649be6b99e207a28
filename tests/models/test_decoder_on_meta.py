"""A step on a device reads nothing on the host, at the sizes of models in production.

Tensors are on torch's `meta` device: they have shapes and no memory, so that whatever depended on a
value would raise. Launches of kernels are counted and not made; tests/kernels/triton compiles them.
"""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton has wheels for Linux only")

from triton.runtime.jit import JITFunction

from baton.kernels.backend import Backend, using_backend
from baton.kernels.kv_pool import PagedLayer, paged_layers
from baton.kernels.paged_batch import PagedBatch
from baton.models.blocks.device_step import DeviceStep
from baton.models.decoder import Decoder
from baton.models.share import Share
from baton.models.spec import read_spec
from baton.parallel.group import Ranks, SoloGroup
from tests.models.meta_checkpoint import MetaCheckpoint
from tests.models.test_families import PUBLISHED, config

LLAMA_8B = config(
    "llama", 4096, 14336, 32, 32, 8, max_position_embeddings=8192, rope_theta=500000.0
) | {"vocab_size": 128256}
LLAMA_70B = config(
    "llama", 8192, 28672, 80, 64, 8, max_position_embeddings=8192, rope_theta=500000.0
) | {"vocab_size": 128256}
MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "8b": (LLAMA_8B, 1),
    "70b tp8": (LLAMA_70B, 8),
    "mixtral": (PUBLISHED["Mixtral-8x7B"] | {"num_hidden_layers": 2}, 1),
    "gpt-oss": (PUBLISHED["gpt-oss-20b"] | {"num_hidden_layers": 2, "layer_types": None}, 1),
    "gemma 2": (PUBLISHED["Gemma-2-2B"] | {"num_hidden_layers": 2}, 1),
    "deepseek tp8": (
        PUBLISHED["DeepSeek-V3, dequantised"] | {"num_hidden_layers": 4, "n_routed_experts": 64},
        8,
    ),
}


class Seat(SoloGroup):
    """A place in a group whose sums are not made."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How often each kernel would have been launched."""
    found: Counter[str] = Counter()

    def run(self: Any, *args: Any, grid: tuple[int, ...], **options: Any) -> None:
        assert 0 < grid[0] < 2**31, f"{self.fn.__name__}: grid {grid}"
        assert all(0 < side < 2**16 for side in grid[1:]), f"{self.fn.__name__}: grid {grid}"
        found[self.fn.__name__] += 1

    monkeypatch.setattr(JITFunction, "run", run)
    with using_backend(Backend.TRITON):
        yield found


def loaded(name: str, folder: Path) -> tuple[Decoder, tuple[PagedLayer, ...]]:
    fields, tp = MODELS[name]
    (folder / "config.json").write_text(json.dumps({k: v for k, v in fields.items() if v}))
    spec = read_spec(folder)
    share = Share(Ranks(tp=Seat(tp - 1, tp)))
    model = Decoder(spec, MetaCheckpoint(), dtype="bfloat16", threads=1, share=share)
    layout = share.kv(spec, 16, "bfloat16").layout
    pool = torch.empty(layout.shape(4096), dtype=torch.bfloat16, device="meta")
    return model, paged_layers(pool)


def step(decodes: int, chunks: tuple[int, ...] = ()) -> DeviceStep:
    tokens, sequences = decodes + sum(chunks), decodes + len(chunks)

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    tables, lengths = empty(sequences, 512), empty(sequences)
    starts = empty(len(chunks) + 1) if chunks else None
    whole = [empty(tokens, dtype=torch.int64) for _ in range(3)]
    sampled = empty(sequences, dtype=torch.int64) if chunks else None
    known = tuple((rows, rows) for rows in chunks)
    return DeviceStep(*whole, PagedBatch(tables, lengths, decodes, starts, known), sampled)


@pytest.mark.parametrize("name", MODELS)
def test_a_step_reads_nothing_on_the_host(
    name: str, tmp_path: Path, launches: Counter[str]
) -> None:
    model, layers = loaded(name, tmp_path)
    assert model.capturable
    vocabulary = model.share.vocabulary(model.spec)
    for batch in (1, 256):
        assert model.forward_device(step(batch), layers).shape == (
            batch,
            vocabulary.stop - vocabulary.start,
        )
    mixed = model.forward_device(step(8, (4096, 1000)), layers)
    assert mixed.shape[0] == 10
    assert mixed.dtype == torch.float32


def test_a_step_of_decodes_launches_what_it_must(tmp_path: Path, launches: Counter[str]) -> None:
    """One plan serves all layers; what a layer launches is a matter of speed."""
    model, layers = loaded("8b", tmp_path)
    model.forward_device(step(32), layers)
    depth = model.spec.layers
    assert launches["_plan"] == 1
    assert launches["_attend"] == launches["_rope_kv_write"] == launches["_gate_mul"] == depth
    assert launches["_skinny"] == 4 * depth + 1
    assert launches["_add_rms_norm"] == 2 * depth + 1
