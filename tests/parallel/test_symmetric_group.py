"""What goes through symmetric memory, on tensors without memory: torch's operation itself runs on
them, so far as to check what it is given. What it computes is for tests/gpu/test_nccl.py.
"""

import pytest
import torch
from torch import Tensor

from baton.parallel.group import SoloGroup
from baton.parallel.symmetric_group import LIMIT_BYTES, SymmetricGroup


class Counting(SoloGroup):
    """The group below."""

    def __init__(self) -> None:
        self.calls = 0

    def all_reduce_(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x


@pytest.mark.parametrize(
    ("shape", "dtype", "shared"),
    [
        ((4, 8), torch.float32, True),
        ((4, 8), torch.bfloat16, True),
        ((LIMIT_BYTES // 64, 16), torch.float32, True),
        ((LIMIT_BYTES // 64 + 1, 16), torch.float32, False),
        ((3,), torch.float32, False),
        ((0, 8), torch.float32, False),
        ((4, 8), torch.int64, False),
    ],
)
def test_small_messages_of_floats_go_through_shared_memory(
    shape: tuple[int, ...], dtype: torch.dtype, shared: bool
) -> None:
    below = Counting()
    buffer = torch.empty(LIMIT_BYTES, dtype=torch.uint8, device="meta")
    group = SymmetricGroup(below, buffer, "group of this test")
    x = torch.empty(shape, dtype=dtype, device="meta")
    assert group.all_reduce_(x) is x
    [addend] = group.addends(x)
    assert (addend.shape, addend.dtype) == (x.shape, x.dtype)
    assert below.calls == (0 if shared else 1)
    group.leave()
    group.all_reduce_(x)
    assert below.calls == (1 if shared else 2)
