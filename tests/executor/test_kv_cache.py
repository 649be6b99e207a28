"""The pool's tensor, its bytes and its size."""

import ctypes
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from baton.core.errors import InvalidConfig
from baton.core.ids import BlockId
from baton.core.kv_layout import KVLayout
from baton.executor import kv_cache
from baton.executor.kv_cache import KVCache, blocks_that_fit, copy_blocks, make_layout
from baton.kv_transfer.shm.memory import SharedMemory
from baton.models.spec import read_spec

LAYOUT = KVLayout(layers=3, kv_heads=2, block_size=8, head_dim=16, dtype="float32")


def test_the_layout_follows_from_the_model(tiny_llama_dir: Path) -> None:
    layout = make_layout(read_spec(tiny_llama_dir), 32, "bfloat16")
    assert layout == KVLayout(4, 2, 32, 16, "bfloat16")
    with pytest.raises(InvalidConfig, match=r"dtype.*fp8.*bfloat16"):
        make_layout(read_spec(tiny_llama_dir), 32, "fp8")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_block_major_zeroed_and_as_large_as_the_layout_says(dtype: str) -> None:
    layout = KVLayout(3, 2, 8, 16, dtype)
    kv = KVCache(layout, 5)
    assert kv.tensor.shape == (5, 3, 2, 2, 8, 16)
    assert kv.tensor.is_contiguous()
    assert not kv.tensor.any()
    assert kv.nbytes == kv.tensor.numel() * kv.tensor.element_size() == 5 * layout.block_bytes
    assert kv.address == kv.tensor.data_ptr()
    assert "5 blocks" in repr(kv)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_its_bytes_are_those_in_memory(dtype: str) -> None:
    kv = KVCache(KVLayout(3, 2, 8, 16, dtype), 4)
    kv.tensor.copy_(torch.randn(kv.tensor.shape))
    assert bytes(kv.memory) == ctypes.string_at(kv.address, kv.nbytes)
    assert kv.memory.readonly
    kv.tensor[2, 1] += 1
    assert bytes(kv.memory) == ctypes.string_at(kv.address, kv.nbytes), "it is a copy"


def test_blocks_that_fit() -> None:
    assert LAYOUT.block_bytes == 6144
    assert blocks_that_fit(LAYOUT, 3) == 3 * 2**20 // 6144


def test_refuses_memory_for_less_than_one_block() -> None:
    large = KVLayout(layers=80, kv_heads=8, block_size=32, head_dim=128, dtype="float32")
    assert large.block_bytes == 20 << 20
    assert blocks_that_fit(large, 20) == 1
    with pytest.raises(InvalidConfig, match=r"kv_memory_mib: 19 .* at least 20"):
        blocks_that_fit(large, 19)


def test_refuses_more_than_the_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidConfig, match=r"kv_memory_mib: 1073741824 .* at most \d+"):
        blocks_that_fit(LAYOUT, 1 << 30)
    monkeypatch.setattr(kv_cache, "available_memory", lambda: (100 << 20) - 1)
    with pytest.raises(InvalidConfig, match="at most 99"):
        blocks_that_fit(LAYOUT, 100)


def test_blocks_are_copied_whole_between_pools() -> None:
    layout = KVLayout(layers=2, kv_heads=1, block_size=8, head_dim=4, dtype="float32")
    device, host = KVCache(layout, 4), KVCache(layout, 3)
    device.tensor.copy_(torch.randn(device.tensor.shape))
    before = device.tensor.clone()
    copy_blocks(device, host, [(BlockId(3), BlockId(0)), (BlockId(1), BlockId(2))])
    assert host.tensor[0].equal(before[3])
    assert host.tensor[2].equal(before[1])
    assert not host.tensor[1].any()
    copy_blocks(host, device, [(BlockId(0), BlockId(1)), (BlockId(2), BlockId(0))])
    copy_blocks(host, device, [])
    assert device.tensor.equal(before[[1, 3, 2, 3]])


def test_copies_between_pools_are_launched_and_not_waited_for() -> None:
    """Nothing is allocated and no number read on the way: on a GPU either would stop the host."""
    called: list[tuple[str, bool]] = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is not torch.ops.aten.select.int:
                called.append((str(func), bool(args[2:] and args[2])))
            return func(*args, **(kwargs or {}))

    layout = KVLayout(layers=2, kv_heads=1, block_size=8, head_dim=4, dtype="float32")
    device, host = KVCache(layout, 4), KVCache(layout, 3)
    with Spy():
        copy_blocks(device, host, [(BlockId(3), BlockId(0)), (BlockId(1), BlockId(2))])
    assert called == [("aten.copy_.default", True)] * 2


def test_a_pool_may_lie_in_memory_that_others_map() -> None:
    shared = SharedMemory(5 * LAYOUT.block_bytes)
    kv = KVCache(LAYOUT, 5, memory=torch.frombuffer(shared.buffer, dtype=torch.uint8))
    assert (kv.address, kv.nbytes) == (shared.address, len(shared.buffer))
    assert kv.tensor.shape == LAYOUT.shape(5)
    kv.tensor[4] = 1.5
    block = kv.memory[4 * LAYOUT.block_bytes : 5 * LAYOUT.block_bytes]
    assert shared.buffer[-LAYOUT.block_bytes :] == block.tobytes()
