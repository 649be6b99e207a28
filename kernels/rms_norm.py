"""Root mean square normalisation (Zhang and Sennrich, 2019)."""

from torch import Tensor
from torch.nn import functional


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x²) + eps) × weight over the last dimension.

    x is [tokens, hidden], weight [hidden].
    """
    return functional.rms_norm(x, weight.shape, weight, eps)
