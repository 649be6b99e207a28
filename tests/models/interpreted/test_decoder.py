"""Whole decoders through Triton's kernels, as they run on a GPU, against torch on the host."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from baton.kernels.backend import Backend, using_backend
from baton.kernels.triton import decode_plan
from baton.models.decoder import Decoder
from baton.models.loader import load_model
from tests.models.device_cases import FAMILIES, SIZES, worst_gap


@pytest.fixture(autouse=True)
def triton_computes() -> Iterator[None]:
    with using_backend(Backend.TRITON):
        yield


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a small GPU, whose programs the interpreter runs one by one."""
    monkeypatch.setattr(decode_plan, "_PROGRAMS", 8)
    monkeypatch.setattr(decode_plan, "_LEAST_TILES", 1)


@pytest.mark.parametrize("family", ["qwen3", "gemma 2", "gpt-oss", "deepseek-v3"])
def test_kernels_give_the_same_logits(
    family: str, tmp_path: Path, write_model: Callable[..., Path]
) -> None:
    model_type, config = FAMILIES[family]
    folder = write_model(tmp_path, model_type, **(SIZES | config))
    model = load_model(folder, executor="torch")
    assert isinstance(model, Decoder)
    assert worst_gap(model) < 5e-6
