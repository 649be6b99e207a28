"""Root mean square norms with frozen weights."""

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional

from baton.kernels.add_rms_norm import add_rms_norm_
from baton.kernels.rms_norm import rms_norm
from baton.models.decoder_spec import DecoderSpec
from baton.models.weights import Checkpoint


class Norm:
    """Normalises the last dimension."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight = weight
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        """Return x, normalised and weighted."""
        return rms_norm(x, self.weight, self.eps)

    def add_(self, addends: Sequence[Tensor], stream: Tensor) -> Tensor:
        """Add the sum of the addends to the stream in place; return the stream's norm."""
        return add_rms_norm_(addends, stream, self.weight, self.eps)


class HeadNorm:
    """Normalises every head by itself; heads of q and of k have weights of their own."""

    def __init__(self, weights: Tensor, eps: float) -> None:
        """Take weights [heads, head_dim]."""
        self.weights = weights
        self.eps = eps

    def normalise_(self, heads: Tensor) -> None:
        """Normalise [tokens, heads, head_dim] in place."""
        normed = functional.rms_norm(heads, heads.shape[-1:], eps=self.eps)
        heads.copy_(normed.mul_(self.weights))


def norm_weight(checkpoint: Checkpoint, name: str, size: int, decoder: DecoderSpec) -> Tensor:
    """Return what a norm multiplies by: its weight on disk, or 1 more than that."""
    weight = checkpoint.take(f"{name}.weight", size)
    return weight + 1 if decoder.unit_offset_norms else weight


def load_norm(checkpoint: Checkpoint, name: str, size: int, decoder: DecoderSpec) -> Norm:
    """Read a norm of `size` values."""
    return Norm(norm_weight(checkpoint, name, size, decoder), decoder.norm_eps)
