"""The embedding and the output matrix, of which each rank has the rows of some tokens."""

from torch import Tensor
from torch.nn import functional

from baton.kernels.linear import Linear


class Embedding:
    """The rows of the tokens from `first` on."""

    def __init__(self, weight: Tensor, first: int) -> None:
        self._weight = weight
        self._first = first

    def __call__(self, tokens: Tensor) -> Tensor:
        """Return this rank's part of the sum [tokens, hidden]: 0 for tokens it does not have."""
        rows = self._weight.shape[0]
        own = tokens - self._first
        foreign = (own < 0) | (own >= rows)
        found = functional.embedding(own.clamp_(0, rows - 1), self._weight)
        return found.masked_fill_(foreign[:, None], 0.0)


class Head:
    """The logits of some tokens of the vocabulary, from normed hidden states."""

    def __init__(self, weight: Tensor, softcap: float | None) -> None:
        self._product = Linear(weight)
        self._softcap = softcap

    def __call__(self, normed: Tensor) -> Tensor:
        """Return float32 logits [rows, the rank's tokens]."""
        logits = self._product(normed).float()
        cap = self._softcap
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)
