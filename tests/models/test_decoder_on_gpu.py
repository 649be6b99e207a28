"""Decoders on a GPU, where there is one: the same steps as on the host, launched and captured."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from baton.kernels.backend import Backend, using_backend
from tests.models.device_cases import FAMILIES, SIZES, STEPS, loaded_twice, on_device, worst_gap

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


@pytest.fixture(params=FAMILIES)
def folder(
    request: pytest.FixtureRequest, tmp_path: Path, write_model: Callable[..., Path]
) -> Path:
    model_type, config = FAMILIES[request.param]
    return write_model(tmp_path, model_type, **(SIZES | config))


@pytest.mark.parametrize("backend", list(Backend))
def test_a_gpu_gives_the_same_logits(folder: Path, backend: Backend) -> None:
    assert worst_gap(folder, backend, "cuda") < 2e-5


def test_a_captured_step_serves_other_sequences(folder: Path) -> None:
    """A graph of padding alone, replayed with a step of decodes in its buffers."""
    twice = loaded_twice(folder, Backend.TRITON, "cuda")
    *before, (parts, padding) = STEPS
    rows = len(parts) + padding
    with using_backend(Backend.TRITON):
        for some, empty in before:
            twice.step(some, empty)
        static = on_device(twice.device_step((), rows), torch.device("cuda"))
        twice.run(static)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = twice.run(static)
        real = twice.device_step(parts, padding)
        for name in ("tokens", "positions", "slots"):
            getattr(static, name).copy_(getattr(real, name))
        static.batch.tables.copy_(real.batch.tables)
        static.batch.lengths.copy_(real.batch.lengths)
        graph.replay()
        replayed = found.cpu()
        expected, launched = twice.step(parts, padding)
    assert replayed[: len(parts)].equal(launched)
    assert (launched - expected).norm() / expected.norm() < 2e-5
