"""A checkpoint of any model and size, whose tensors have shapes and no memory."""

from collections.abc import Sequence

import torch
from torch import Tensor

from baton.models.weights import Checkpoint, Cut, Rows


class MetaCheckpoint(Checkpoint):
    """Has whatever is asked for, except what families may have fused or packed."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        self.dtype = dtype
        self.device = torch.device("meta")

    def __contains__(self, name: str) -> bool:
        return False

    def take(self, name: str, *shape: int, cut: Cut = ()) -> Tensor:
        whole = torch.empty(shape, dtype=self.dtype, device="meta")
        return whole[cut].contiguous() if cut else whole

    def take_fused(
        self, whole: str, parts: Sequence[Rows], *, width: int, bias: bool
    ) -> tuple[Tensor, Tensor | None]:
        rows = sum(len(range(*part.wanted.indices(part.total))) for part in parts)
        return self.take(whole, rows, width), self.take(whole, rows) if bias else None

    def leave(self, *names: str) -> None:
        pass

    def finish(self, **_: object) -> None:
        pass
