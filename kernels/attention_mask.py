"""Additive masks: which keys a query may see, causally and within a sliding window."""

import torch
from torch import Tensor


def band_mask(
    rows: int, keys: int, window: int | None, *, dtype: torch.dtype, device: torch.device | str
) -> Tensor:
    """Return [rows, keys]: 0 where a row sees a key and -inf elsewhere.

    The last row is the token of the last key, the row before it that of the key before, and so
    on, so that the corner at the lower right serves every smaller number of rows or keys as well.
    A row sees its own key and those before it, `window` keys in all at most.
    """
    row = torch.arange(rows - 1, -1, -1, device=device)[:, None]
    key = torch.arange(keys - 1, -1, -1, device=device)
    return additive(beyond(key - row, window), dtype)


def beyond(distance: Tensor, window: int | None) -> Tensor:
    """Return where a key that lies `distance` tokens before its query cannot be seen."""
    hidden = distance < 0
    return hidden if window is None else hidden.logical_or_(distance >= window)


def additive(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 0 where `hidden` is false and -inf where it is true."""
    mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
    return mask.masked_fill_(hidden, float("-inf"))
