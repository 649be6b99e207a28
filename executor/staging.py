"""The host memory through which KV passes on its way between a pool and other instances.

    prefill   pool on a device ──copy_out──▶ a page for each block, laid out as the block ◀─ read
    decode    read ─▶ a page for each read, verified there ──deposit──▶ pool, converted if need be

Transports have it registered, beside the pool or in its stead. A pool in host memory is read and
written where it is; it is left aside only where bytes must be converted.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from baton.core.handover import BlockRef
from baton.core.ids import BlockId
from baton.core.kv_layout import KVLayout, LayerRange
from baton.executor.device import Device
from baton.executor.kv_cache import KVCache
from baton.kernels.kv_convert import convert_kv
from baton.kernels.kv_gather import gather_kv
from baton.kv_transfer.plan import Conversion
from baton.kv_transfer.staging_pool import StagingPool


class Staging:
    """Pages of staging memory, and how KV gets into and out of them. Copies block: use a thread."""

    def __init__(
        self,
        kv: KVCache,
        memory: Tensor,
        page_bytes: int,
        *,
        offset: int,
        device: Device | None,
        deposits: bool = True,
    ) -> None:
        """`memory` [pages × page_bytes] (uint8) begins `offset` bytes into the registered region.

        `device` is where the pool lies, if not in host memory; `deposits`: whether anything is to
        be put into it.
        """
        self.page_bytes = page_bytes
        self.pool = StagingPool(memory.numel() // page_bytes)
        """Whose each page is."""
        self._kv = kv
        self._memory = memory
        self._offset = offset
        self._device = device
        self._inbox: Tensor | None = None
        """The pages once more, on the device: what is to be converted there."""
        if device is not None:
            device.pin(memory)
            # Now, and counted by `staged_on_device`: a full device refuses it while it serves.
            self._inbox = device.allocate(memory.numel()) if deposits else None

    def __repr__(self) -> str:
        return f"<Staging of {self.page_bytes} bytes a page, {self.pool!r}>"

    @property
    def memory(self) -> memoryview:
        """All pages, read-only and without a copy."""
        view: memoryview = self._memory.numpy().data
        return view.toreadonly()

    def offset(self, page: BlockId) -> int:
        """Return where a page begins in the registered region, in bytes."""
        return self._offset + page * self.page_bytes

    def page(self, page: BlockId) -> memoryview:
        """Return the bytes of a page, read-only and without a copy."""
        return self.memory[page * self.page_bytes : (page + 1) * self.page_bytes]

    def copy_out(
        self, blocks: Sequence[BlockRef], layers: LayerRange, pages: Sequence[BlockRef]
    ) -> None:
        """Copy `layers` of the pool's blocks into pages, a block to a page, and wait for it.

        Their KV has been computed: whoever offers it has heard so (executor/paced_runner.py).

        Pages are as large as blocks. Neighbours are filled by one copy, if all layers are copied.
        """
        assert self._device is not None, "a pool in host memory is read where it is"
        layout = self._kv.layout
        assert self.page_bytes == layout.block_bytes, f"{self} for blocks of {layout}"
        start, size = layout.run(BlockId(0), layers)
        host = self._memory.view(-1, self.page_bytes)[:, start : start + size]
        joined = layers == layout.all_layers
        events = []
        with self._device.stream(outward=True):
            numbers = [ref.block for ref in blocks]
            index = torch.tensor(numbers, dtype=torch.int64, device=self._kv.tensor.device)
            gathered = gather_kv(self._kv.bytes, layout, index, layers)
            for first, end in _neighbours([page.block for page in pages], joined=joined):
                target = host[pages[first].block : pages[end - 1].block + 1]
                events.append(self._device.copy_to_host(gathered[first:end], target))
        for event in events:
            event.wait()

    def deposit(self, page: BlockId, conversion: Conversion) -> None:
        """Put the units in a page into the pool's blocks, and wait for it."""
        size = _staged_bytes(conversion)
        begin = page * self.page_bytes
        staged = self._memory[begin : begin + size]
        if self._device is None:
            self._convert(staged, conversion)
            return
        assert self._inbox is not None, "a deposit where there are to be none"
        arrived = self._inbox[begin : begin + size]
        self._device.copy_from_host(staged, arrived).wait()
        with self._device.stream(outward=False):
            self._convert(arrived, conversion)
        self._device.synchronize()

    def _convert(self, staged: Tensor, conversion: Conversion) -> None:
        convert_kv(
            staged,
            conversion.staging,
            self._kv.bytes,
            conversion.target,
            conversion.blocks,
            tokens=conversion.tokens,
            first_layer=conversion.first_layer,
            first_slot=conversion.first_slot,
        )

    def close(self) -> None:
        """Take the memory back from the device; nothing may be under way."""
        if self._device is not None:
            self._device.synchronize()
            self._device.unpin(self._memory)


def _neighbours(pages: Sequence[BlockId], *, joined: bool) -> list[tuple[int, int]]:
    """Cut pages into ranges (first, end) of the sequence that lie end to end; else one by one."""
    ranges: list[tuple[int, int]] = []
    for at, page in enumerate(pages):
        if joined and ranges and pages[at - 1] + 1 == page:
            ranges[-1] = ranges[-1][0], at + 1
        else:
            ranges.append((at, at + 1))
    return ranges


def _staged_bytes(conversion: Conversion) -> int:
    unit: KVLayout = conversion.staging
    return -(-conversion.tokens // unit.block_size) * unit.block_bytes
