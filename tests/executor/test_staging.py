from pathlib import Path

import pytest
import torch
from torch import Tensor

from baton.core.config import HandoverConfig, WorkerConfig
from baton.core.handover import BlockRef
from baton.core.ids import BlockId, Epoch
from baton.core.topology import Role
from baton.executor.handover_memory import HandoverMemory, staged_on_device
from baton.executor.kv_cache import KVCache
from baton.executor.late_device import LateDevice
from baton.executor.staging import Staging

from .device_cases import LAYOUT, check_copy_out, check_deposit, pool_on, refs


class Counting(LateDevice):
    """Knows what was allocated on it."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def allocate(self, size: int) -> Tensor:
        self.sizes.append(size)
        return super().allocate(size)


@pytest.mark.parametrize("seed", range(5))
def test_what_is_copied_out_lies_in_pages_as_in_blocks(seed: int) -> None:
    device = LateDevice(seed)
    check_copy_out(device)
    # Four copies for each group of layers; pages 4 and 5, and 1 and 2, share one of whole blocks.
    assert device.copies_to_host == 4 + 4 + 4 + 2
    device.check()


@pytest.mark.parametrize("seed", range(5))
def test_what_is_deposited_is_converted_on_the_device(seed: int) -> None:
    device = LateDevice(seed)
    check_deposit(device)
    assert device.copies_from_host == 1
    device.check()


def test_pages_for_a_pool_in_host_memory_are_not_pinned_and_never_copied_out() -> None:
    kv = KVCache(LAYOUT, 2)
    memory = torch.zeros(3 * LAYOUT.block_bytes, dtype=torch.uint8)
    staging = Staging(kv, memory, LAYOUT.block_bytes, offset=0, device=None)
    assert staging.memory.readonly
    assert "total=3" in repr(staging)
    with pytest.raises(AssertionError, match="read where it is"):
        staging.copy_out(refs(0), LAYOUT.all_layers, refs(0))
    staging.close()


def test_pages_that_are_not_blocks_are_nothing_to_copy_out_to() -> None:
    device = LateDevice()
    memory = torch.zeros(3 * LAYOUT.block_bytes, dtype=torch.uint8)
    kv = pool_on(device, LAYOUT, 2)
    staging = Staging(kv, memory, 2 * LAYOUT.block_bytes, offset=0, device=device)
    with pytest.raises(AssertionError, match="for blocks of"):
        staging.copy_out(refs(0), LAYOUT.all_layers, [BlockRef(BlockId(0), Epoch(0))])


def test_all_that_staging_takes_of_a_device_is_there_from_the_start_and_counted(
    tmp_path: Path,
) -> None:
    for role, deposits in ((Role.PREFILL, False), (Role.DECODE, True)):
        config = WorkerConfig(
            instance_id="one-0",
            role=role,
            model_dir=tmp_path,
            model_name="one",
            handover=HandoverConfig(staging_mib=1),
        )
        device = Counting()
        memory = HandoverMemory(config, LAYOUT, 3, device)
        staged = staged_on_device(config, LAYOUT)
        assert memory.staging is not None
        assert staged == memory.staging.page_bytes * memory.staging.pool.stats().total
        assert device.sizes == [3 * LAYOUT.block_bytes, *([staged] if deposits else [])]
        memory.close()
    assert staged_on_device(config.model_copy(update={"role": Role.MIXED}), LAYOUT) == 0
