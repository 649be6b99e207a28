"""Tests that need a GPU; without one each is skipped.

    pytest tests/gpu

They need torch with CUDA, Triton 3.6, and for comparisons transformers. What they do themselves can
be tried on a CPU, with torch in the kernels' place, by BATON_GPU_TESTS_ON=cpu.
"""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2]))
"""The processes of ranks import the tests by their full names."""
ON = os.environ.get("BATON_GPU_TESTS_ON", "cuda")


@pytest.fixture
def device() -> torch.device:
    """Where to compute."""
    if ON == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device(ON)
