"""What forward_device computes is what forward does, with torch as the backend of both.

Triton's kernels take the same steps in interpreted/.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from baton.models.decoder import Decoder
from baton.models.loader import load_model
from tests.models.device_cases import FAMILIES, SIZES, worst_gap


@pytest.mark.parametrize("family", FAMILIES)
def test_paged_steps_give_the_same_logits(
    family: str, tmp_path: Path, write_model: Callable[..., Path]
) -> None:
    model_type, config = FAMILIES[family]
    folder = write_model(tmp_path, model_type, **(SIZES | config))
    model = load_model(folder, executor="torch")
    assert isinstance(model, Decoder)
    assert worst_gap(model) < 2e-6
