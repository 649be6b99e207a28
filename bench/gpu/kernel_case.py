"""A row of the kernel table: how to make its inputs, what it launches, and what it must move."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.gpu.clock import Call
from bench.gpu.floors import Work


@dataclass(frozen=True, slots=True)
class KernelCase:
    """One kernel at one shape."""

    name: str
    work: Work
    make: Callable[[], Call]
    """Makes a set of inputs, and returns a call that launches the kernel on them."""
    weights: bool = True
    """Whether it is bound by what lies in memory; else by activations, which a cache may hold."""


@dataclass(frozen=True, slots=True)
class Maker:
    """Makes tensors of random data on the device."""

    device: torch.device
    dtype: torch.dtype

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return numbers of the standard normal distribution."""
        kind = dtype or self.dtype
        wide = kind if kind.itemsize > 1 else torch.bfloat16
        return torch.randn(shape, device=self.device, dtype=wide).to(kind)

    def whole(self, most: int, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        """Return whole numbers from 0 to most - 1."""
        return torch.randint(most, shape, device=self.device, dtype=dtype)

    def full(self, value: float, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return one number everywhere."""
        return torch.full(shape, value, device=self.device, dtype=dtype)

    def tables(self, sequences: int, tokens: int, block_size: int) -> Tensor:
        """Return block tables [sequences, blocks] int32 of sequences in shuffled blocks."""
        each = -(-tokens // block_size)
        order = torch.randperm(sequences * each, device=self.device, dtype=torch.int32)
        return order.view(sequences, each)

    def pool(
        self,
        blocks: int,
        kv_heads: int,
        block_size: int,
        head_dim: int,
        *,
        parts: int = 2,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Return one layer's KV [blocks, parts, kv_heads, block_size, head_dim], filled."""
        return self.normal(blocks, parts, kv_heads, block_size, head_dim, dtype=dtype)
