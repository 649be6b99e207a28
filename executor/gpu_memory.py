"""How much of a GPU's memory is left for the KV pool, by a measured run of the largest step.

others │ weights │ largest step │ captured steps │ staging │ KV pool        │ left alone
├──────────────── gpu_memory_utilization × all of it ─────────────────────┤
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch

from baton.core.config import EngineConfig
from baton.core.errors import InvalidConfig
from baton.core.memory import MIB


class MemoryMeter(Protocol):
    """What a device says of its memory, in bytes."""

    def total(self) -> int:
        """Return all that the device has."""
        ...

    def used(self) -> int:
        """Return what is in use now, by this process and by others."""
        ...

    def peak(self, work: Callable[[], None]) -> int:
        """Do `work` and wait for it; return how much more was in use at a time than before."""
        ...


class CudaMeter:
    """Implements `MemoryMeter`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def total(self) -> int:
        """See MemoryMeter."""
        return int(torch.cuda.mem_get_info(self._device)[1])

    def used(self) -> int:
        """See MemoryMeter: what torch keeps for later is given back first."""
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self._device)
        return int(total - free)

    def peak(self, work: Callable[[], None]) -> int:
        """See MemoryMeter."""
        before = self.used()
        allocated = torch.cuda.memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        work()
        torch.cuda.synchronize(self._device)
        most = torch.cuda.max_memory_allocated(self._device) - allocated
        # Libraries take memory too, which torch does not know of and which stays.
        return max(most, 0) + max(self.used() - before, 0)


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """What a GPU's memory is needed for besides the KV pool, in bytes."""

    total: int
    loaded: int
    """In use once the weights are loaded: by these, by CUDA itself and by other processes."""
    step: int
    """What the largest step needs for a time."""
    captured: int
    """What captured steps need."""
    staged: int = 0
    """What handovers need for staging."""

    def blocks(self, config: EngineConfig, block_bytes: int) -> int:
        """Return how many blocks the pool gets: what is left, or `kv_memory_mib` of it.

        Raises InvalidConfig with the numbers if that is not there.
        """
        share = config.gpu_memory_utilization
        left = int(self.total * share) - self.loaded - self.step - self.captured
        left -= self.staged
        wanted = config.kv_memory_mib
        if wanted is not None and wanted * MIB > left:
            allowed = f"at most {max(left, 0) // MIB}, or what helps against this: {self}"
            raise InvalidConfig("kv_memory_mib", wanted, allowed)
        blocks = (left if wanted is None else wanted * MIB) // block_bytes
        if blocks < 1:
            allowed = f"more, or less of what it is needed for: {self}"
            raise InvalidConfig("gpu_memory_utilization", share, allowed)
        return blocks

    def __str__(self) -> str:
        return (
            f"of {self.total // MIB} MiB, weights and what else is loaded take"
            f" {self.loaded // MIB}, the largest step {self.step // MIB} (lower max_batch_tokens or"
            f" max_sequences), captured steps {self.captured // MIB} (fewer cuda_graph_sizes"
            f" or lower cuda_graph_tokens),"
            f" staging {self.staged // MIB} (lower staging_mib)"
        )


@contextmanager
def told_if_it_does_not_fit(field: str, value: object, allowed: str) -> Iterator[None]:
    """Turn torch's error for memory that a GPU lacks into an InvalidConfig of `field`."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        said = str(error).split(". ")
        raise InvalidConfig(field, value, f"{allowed}: {'. '.join(said[:3])}") from None
