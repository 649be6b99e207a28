"""The memory of an instance that takes part in handovers: its pool, its staging, and the region.

in host memory      │ pool: blocks …                  │ staging: pages … │   one region
on a device         │ pool: blocks … │ its own region    │ staging: pages … │   the region

What reads the memory of devices has the pool registered, everything else the staging: which of both
a handover takes, prefill decides by what decode can read.
"""

import torch
from torch import Tensor

from baton.core.config import WorkerConfig
from baton.core.kv_layout import KVLayout
from baton.core.memory import MIB
from baton.core.topology import Role
from baton.executor.device import Device
from baton.executor.kv_cache import KVCache
from baton.executor.staging import Staging
from baton.kernels.kv_digest import Digests, HashesItself, Labels, Memory, Pieces
from baton.kernels.kv_digest_device import DeviceBytes
from baton.kv_transfer.choose import allocate
from baton.kv_transfer.landing import Landing, least_page
from baton.kv_transfer.transport import Region

_PAGES = 8
"""Reads that can have a page at a time, if pages of an eighth are large enough."""


class HandoverMemory:
    """Allocates all of it at once; it lives as long as the transport, which holds the region."""

    def __init__(
        self,
        config: WorkerConfig,
        layout: KVLayout,
        num_blocks: int,
        device: Device | None = None,
    ) -> None:
        """`device`: where the pool is to lie, if not in host memory."""
        self.device = device
        """Where the pool lies, if not in host memory."""
        self.on_device = device is not None
        """Whether KV passes through staging, unless both sides can do without."""
        page_bytes, pages = _pages(config, layout, on_device=self.on_device)
        pool_bytes = num_blocks * layout.block_bytes
        ahead = 0 if self.on_device else pool_bytes
        memory, self.region = _on_host(config, ahead + pages * page_bytes)
        """What transports are to register."""
        pool = memory[:ahead] if device is None else device.allocate(pool_bytes)
        self.kv = KVCache(layout, num_blocks, memory=pool)
        """The pool."""
        self.device_region: Region | None = None
        """What those are to register that read the memory of devices."""
        if device is not None and device.driver is not None:
            self.device_region = Region(
                pool.data_ptr(), pool_bytes, (device, pool), device=device.driver
            )
        self.staging: Staging | None = None
        """What KV passes through where it cannot be read in place; none if that was not wanted."""
        if pages:
            self.staging = Staging(
                self.kv,
                memory[ahead:],
                page_bytes,
                offset=ahead,
                device=device,
                deposits=config.role is not Role.PREFILL,
            )

    @property
    def pool(self) -> Memory | HashesItself:
        """The pool's bytes, where they lie, to be hashed."""
        return self.kv.memory if self.device is None else _PoolOn(self.device, self.kv)

    @property
    def landing(self) -> Landing:
        """What decode can read into."""
        return Landing(
            in_pool=not self.on_device,
            page_bytes=0 if self.staging is None else self.staging.page_bytes,
        )

    def close(self) -> None:
        """End the staging; to be called after the transport has closed."""
        if self.staging is not None:
            self.staging.close()
            self.staging.pool.check()


def _on_host(config: WorkerConfig, size: int) -> tuple[Tensor, Region]:
    """Return zeroed bytes of host memory, which other processes can map if that is wanted."""
    shared = allocate(size, config.handover)
    if shared is None:
        memory = torch.zeros(size, dtype=torch.uint8)
        return memory, Region(memory.data_ptr(), size, memory)
    memory = torch.frombuffer(shared.buffer, dtype=torch.uint8)
    return memory, shared.region(memory)


def staged_on_device(config: WorkerConfig, layout: KVLayout) -> int:
    """Return the bytes of a device that staging takes, beside the pool there, where it is used.

    In decode what was read lies there once more, before it is converted; in prefill so does what is
    gathered for pages, which is no more than these hold.
    """
    if config.role is Role.MIXED:
        return 0
    page_bytes, pages = _pages(config, layout, on_device=True)
    return page_bytes * pages


class _PoolOn(HashesItself):
    """Implements HashesItself for a pool on a device, beside the model."""

    def __init__(self, device: Device, kv: KVCache) -> None:
        self._device = device
        self._bytes = DeviceBytes(kv.bytes)

    def hash_units(self, key: bytes, pieces: Pieces, labels: Labels) -> Digests:
        """See HashesItself; what is hashed has been computed, or read, and waited for."""
        with self._device.stream(outward=True):
            return self._bytes.hash_units(key, pieces, labels)


def _pages(config: WorkerConfig, layout: KVLayout, *, on_device: bool) -> tuple[int, int]:
    """Return (bytes of a page, pages).

    In prefill a page is a block, and only pools on a device need any. In decode a page holds what
    is read at a time, one block of any peer at least.
    """
    size = config.handover.staging_mib * MIB
    if config.role is Role.PREFILL:
        pages = max(1, size // layout.block_bytes) if on_device else 0
        return layout.block_bytes, pages
    if not (size or on_device):
        return 0, 0
    page_bytes = max(least_page(layout), size // _PAGES)
    return page_bytes, max(1, size // page_bytes)
