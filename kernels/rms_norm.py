"""Root mean square normalisation (Zhang and Sennrich, 2019)."""

from torch import Tensor
from torch.nn import functional

from baton.kernels.backend import triton_serves


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x²) + eps) × weight over the last dimension.

    x is [tokens, hidden], weight [hidden].
    """
    if triton_serves(x) and x.dim() == 2:
        from baton.kernels.triton import add_rms_norm

        return add_rms_norm.rms_norm(x, weight, eps)
    return functional.rms_norm(x, weight.shape, weight, eps)


def add_rms_norm_(x: Tensor, stream: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Add x [tokens, hidden] to the stream of that shape in place; return the stream's norm."""
    if triton_serves(x):
        from baton.kernels.triton import add_rms_norm

        return add_rms_norm.add_rms_norm_(x, stream, weight, eps)
    return rms_norm(stream.add_(x), weight, eps)
