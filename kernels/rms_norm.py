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
