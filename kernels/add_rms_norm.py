"""What follows a sum over ranks in every layer: the residual addition and the norm, in one pass."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from baton.kernels.backend import triton_serves
from baton.kernels.native.add_norm import load_add_norm
from baton.kernels.native.build import NoNativeCode
from baton.kernels.rms_norm import rms_norm


def add_rms_norm_(addends: Sequence[Tensor], stream: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Add the sum of `addends` to the stream in place; return the stream's norm times `weight`.

    The addends, at least one, and the stream are [tokens, hidden], dense and of one type; weight is
    [hidden]. The addends are added to each other first, in order, in float32; the sum is rounded to
    their type, and so is the stream before it is normed, as if the three operations were apart.
    """
    if triton_serves(stream):
        from baton.kernels.triton import add_rms_norm as triton

        return triton.add_rms_norm_(sum_in_order(addends), stream, weight, eps)
    if not (_suits(stream) and is_native()):
        return rms_norm(stream.add_(sum_in_order(addends)), weight, eps)
    out = torch.empty_like(stream)
    assert stream.is_contiguous(), "a stream that is not dense"
    assert all(x.is_contiguous() for x in addends), "addends that are not dense"
    tokens, hidden = stream.shape
    addresses = [x.data_ptr() for x in addends]
    load_add_norm().add_norm(
        addresses, stream.data_ptr(), (tokens, hidden), weight.data_ptr(), eps, out.data_ptr()
    )
    return out


def _suits(stream: Tensor) -> bool:
    return stream.device.type == "cpu" and stream.dtype == torch.float32


def sum_in_order(addends: Sequence[Tensor]) -> Tensor:
    """Return the sum, one after the other; of more than two short floats in float32."""
    first, *others = addends
    if not others:
        return first
    if len(others) == 1:
        return first + others[0]
    total = first.float()
    if total is first:
        total = first.clone()
    for other in others:
        total += other
    return total.to(first.dtype)


@functools.cache
def is_native() -> bool:
    """Return whether native code computes it for float32; compiles it first if need be."""
    try:
        load_add_norm()
    except NoNativeCode as error:
        from baton.core.log import get_logger  # benchmarks of kernels run where there is no log

        get_logger(__name__).warning(
            "residual additions and norms go one by one through torch", why=str(error)
        )
        return False
    return True
