"""What forward_device computes is what forward does, with torch as the backend of both.

Triton's kernels take the same steps in interpreted/.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from baton.kernels.backend import Backend
from tests.models.device_cases import FAMILIES, SIZES, worst_gap


@pytest.mark.parametrize("family", FAMILIES)
def test_paged_steps_give_the_same_logits(
    family: str, tmp_path: Path, write_model: Callable[..., Path]
) -> None:
    model_type, config = FAMILIES[family]
    folder = write_model(tmp_path, model_type, **(SIZES | config))
    assert worst_gap(folder, Backend.TORCH) < 2e-6
