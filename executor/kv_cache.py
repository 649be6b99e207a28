"""The tensor that holds a rank's KV blocks; which block is whose is the engine's affair."""

from collections.abc import Sequence

import torch
from torch import Tensor

from baton.core.errors import InvalidConfig
from baton.core.ids import BlockId
from baton.core.kv_layout import KVLayout
from baton.core.memory import MIB, available_memory
from baton.kernels.kv_pool import KVLayer, layer_views
from baton.models.spec import ModelSpec
from baton.models.weights import torch_dtype


def make_layout(spec: ModelSpec, block_size: int, dtype: str) -> KVLayout:
    """Return the layout of a model's KV in blocks of `block_size` tokens of `dtype`.

    Raises InvalidConfig for a dtype that KV cannot have.
    """
    torch_dtype(dtype)
    return spec.kv_layout(block_size, dtype)


def blocks_that_fit(layout: KVLayout, memory_mib: int, field: str = "kv_memory_mib") -> int:
    """Return how many blocks fit into `memory_mib`, at least one.

    Raises InvalidConfig for `field`, with the numbers, if not one fits or if the machine has less
    to give.
    """
    blocks = memory_mib * MIB // layout.block_bytes
    if blocks < 1:
        least = -(-layout.block_bytes // MIB)
        raise InvalidConfig(field, memory_mib, f"at least {least}: one block of this model's KV")
    available = available_memory() // MIB
    if memory_mib > available:
        raise InvalidConfig(field, memory_mib, f"at most {available}: the memory available here")
    return blocks


class KVCache:
    """The pool's memory, zeroed, [num_blocks, layers, parts, kv_heads, block_size, head_dim]."""

    def __init__(
        self,
        layout: KVLayout,
        num_blocks: int,
        device: str = "cpu",
        *,
        pinned: bool = False,
        memory: Tensor | None = None,
    ) -> None:
        """`pinned`: in host memory that a GPU copies from and to by itself.

        `memory`: zeroed bytes (uint8) of exactly the pool's size to lie in, on any device.
        """
        assert num_blocks > 0
        self.layout = layout
        self.num_blocks = num_blocks
        shape = layout.shape(num_blocks)
        dtype = torch_dtype(layout.dtype)
        if memory is None:
            self.tensor = torch.zeros(shape, dtype=dtype, device=device, pin_memory=pinned)
        else:
            self.tensor = memory.view(dtype).view(shape)
        self.layers: tuple[KVLayer, ...] = layer_views(self.tensor)
        """One view of the pool per layer, for the kernels."""

    def __repr__(self) -> str:
        return f"<KVCache {self.num_blocks} blocks, {self.nbytes / MIB:.0f} MiB, {self.layout}>"

    @property
    def address(self) -> int:
        """Where the pool begins in memory."""
        return self.tensor.data_ptr()

    @property
    def nbytes(self) -> int:
        """The pool's size in bytes."""
        return self.num_blocks * self.layout.block_bytes

    @property
    def bytes(self) -> Tensor:
        """The pool's bytes [num_blocks × block_bytes] (uint8), as a view."""
        return self.tensor.view(-1).view(torch.uint8)

    @property
    def memory(self) -> memoryview:
        """The pool's bytes, read-only and without a copy; for pools in host memory."""
        view: memoryview = self.bytes.numpy().data
        return view.toreadonly()


def copy_blocks(source: KVCache, target: KVCache, pairs: Sequence[tuple[BlockId, BlockId]]) -> None:
    """Copy whole blocks between two pools of the same layout; pairs of (source, target).

    Between a device and host memory that is pinned, the copies are launched, and nobody waits: a
    block is one run of bytes in either, and no table of blocks has to reach the device.
    """
    assert source.layout == target.layout, f"{source} and {target}"
    for taken, put in pairs:
        target.tensor[put].copy_(source.tensor[taken], non_blocking=True)
