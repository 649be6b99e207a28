"""What follows an all-reduce in every layer, in one call with it."""

from torch import Tensor
from torch.nn import functional

from baton.parallel.group import Group


def all_reduce_add_norm(
    group: Group, partial: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> Tensor:
    """Add the sum of all ranks' `partial` to `residual` and return its RMS norm times `weight`.

    partial and residual are [tokens, hidden] and both overwritten, the residual with what the next
    layer adds to; weight is [hidden]. The reference, and what runs on CPUs, where bench/parallel.py
    finds the add and the norm to be a small part of the call.
    """
    residual += group.all_reduce_(partial)
    return functional.rms_norm(residual, weight.shape, weight, eps)
