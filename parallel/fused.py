"""What follows an all-reduce in every layer, in one call with it."""

from torch import Tensor
from torch.nn import functional

from baton.parallel.group import Group
from baton.parallel.passes import passes


def all_reduce_add_norm(
    group: Group, partial: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> Tensor:
    """Add the sum of all ranks' `partial` to `residual` and return its RMS norm times `weight`.

    partial and residual are [tokens, hidden]; residual becomes what the next layer adds to, and
    partial is used up: the norm may lie in it. weight is [hidden]. The bits are those of the three
    operations one by one.
    """
    group.all_reduce_(partial)
    row_bytes = residual.shape[1] * residual.itemsize
    parts = list(passes(residual.shape[0], row_bytes, residual.device))
    if len(parts) == 1:
        residual += partial
        return functional.rms_norm(residual, weight.shape, weight, eps)
    for rows in parts:
        some = residual[rows]
        some += partial[rows]
        partial[rows] = functional.rms_norm(some, weight.shape, weight, eps)
    return partial
