"""Tests in this folder run in a process of their own, where kernels are interpreted on the CPU.

Whether a kernel is interpreted is decided when it is defined. test_interpreted.py runs them all;
by hand:

    TRITON_INTERPRET=1 pytest tests/kernels/triton/interpreted

Where there is a GPU the same tests run on it, compiled: see tests/gpu/test_kernels.py, or by hand

    BATON_KERNELS_ON=cuda pytest tests/kernels/triton/interpreted
"""

import os
from collections.abc import Iterator

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_DEVICE = os.environ.get("BATON_KERNELS_ON")

collect_ignore_glob = [] if INTERPRETED or ON_DEVICE else ["*.py"]

if INTERPRETED:
    import torch

    from tests.kernels.triton.low_precision import repair

    repair()
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def on_the_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have tensors made on the device that is named, and the numbers in them drawn there."""
    if not ON_DEVICE:
        yield
        return
    import torch

    generator, device = torch.Generator, torch.device(ON_DEVICE)
    monkeypatch.setattr(torch, "Generator", lambda: generator(device))
    with device:
        yield
