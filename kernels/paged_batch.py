"""Which sequences a step has, as kernels on a device see them."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class PagedBatch:
    """The sequences of one step: decodes, of one new token each, before chunks of prompts."""

    tables: Tensor
    """[sequences, blocks] int32: each sequence's blocks, whatever comes after its last one."""
    lengths: Tensor
    """[sequences] int32: tokens, the new ones included; 0 for padding."""
    decodes: int
    """How many of the sequences, and of the step's rows, are decodes."""
    starts: Tensor | None = None
    """[chunks + 1] int32: where each chunk's rows begin, counted from the end of the decodes, and
    where the last one's end; None in a step without chunks."""
    chunks: tuple[tuple[int, int], ...] = ()
    """(rows, length) of each chunk, as the host knows them. Only latent attention needs them, whose
    chunks are computed one by one; such steps cannot be captured in a CUDA graph."""
    skip_below: float = 0.0
    """See `prefill_attention` in kernels/triton: 0 skips nothing."""

    def __post_init__(self) -> None:
        assert self.tables.shape[0] == self.lengths.shape[0]
        chunks = 0 if self.starts is None else self.starts.shape[0] - 1
        assert self.decodes + chunks == self.lengths.shape[0]

    def only_decodes(self) -> "PagedBatch":
        """Return the batch without its chunks."""
        return PagedBatch(self.tables[: self.decodes], self.lengths[: self.decodes], self.decodes)
