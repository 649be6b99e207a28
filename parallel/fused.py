"""What follows an all-reduce in every layer, in one call with it."""

from torch import Tensor
from torch.nn import functional

from baton.parallel.group import Group
from baton.parallel.passes import PASS_BYTES, passes


def all_reduce_add_norm(
    group: Group, partial: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> Tensor:
    """Add the sum of all ranks' `partial` to `residual` and return its RMS norm times `weight`.

    partial and residual are [tokens, hidden]; residual becomes what the next layer adds to, and
    partial is used up: the norm may lie in it. weight is [hidden]. The bits are those of the three
    operations one by one.
    """
    group.all_reduce_(partial)
    if residual.device.type != "cpu" or residual.nbytes <= PASS_BYTES:
        residual += partial
        return functional.rms_norm(residual, weight.shape, weight, eps)
    row_bytes = residual.shape[1] * residual.itemsize
    for rows in passes(residual.shape[0], row_bytes, residual.device):
        some = residual[rows]
        some += partial[rows]
        partial[rows] = functional.rms_norm(some, weight.shape, weight, eps)
    return partial
