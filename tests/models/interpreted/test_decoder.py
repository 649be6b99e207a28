"""Whole decoders through Triton's kernels, as they run on a GPU, against torch on the host."""

from collections.abc import Callable
from pathlib import Path

import pytest

from baton.kernels.backend import Backend
from baton.kernels.triton import decode_plan
from tests.models.device_cases import FAMILIES, SIZES, worst_gap


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
    assert worst_gap(folder, Backend.TRITON) < 5e-6
