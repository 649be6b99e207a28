"""Staging between a real device and pinned host memory; skipped where there is no CUDA."""

import numpy as np
import pytest
import torch

from baton.executor.cuda_device import CudaDevice
from baton.kernels.kv_digest import Pieces, expand_key, hash_units
from baton.kernels.kv_digest_device import DeviceBytes
from baton.kv_transfer.shm.memory import SharedMemory

from ..executor.device_cases import check_copy_out, check_deposit  # noqa: TID252

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_what_is_copied_out_lies_in_pages_as_in_blocks() -> None:
    check_copy_out(CudaDevice())


def test_what_is_deposited_is_converted_on_the_device() -> None:
    check_deposit(CudaDevice())


def test_shared_memory_can_be_pinned_and_copied_from_and_to() -> None:
    device, size = CudaDevice(), 1 << 20
    shared = SharedMemory(size)
    host = torch.frombuffer(shared.buffer, dtype=torch.uint8)
    device.pin(host)
    host[:] = torch.arange(size, dtype=torch.int64).to(torch.uint8)
    there = device.allocate(size)
    device.copy_from_host(host, there).wait()
    with device.stream(outward=True):
        turned = there.flip(0)
        device.copy_to_host(turned, host).wait()
    assert host.equal(torch.arange(size - 1, -1, -1, dtype=torch.int64).to(torch.uint8))
    device.unpin(host)


def test_an_event_is_the_end_of_what_the_model_has_started() -> None:
    device = CudaDevice()
    host = torch.zeros(1 << 20, dtype=torch.uint8)
    device.pin(host)
    there = device.allocate(host.numel())
    busy = torch.randn(4096, 4096, device=there.device)
    for _ in range(20):
        busy = busy @ busy
    there.fill_(7)
    event = device.record()
    event.wait()
    assert event.done
    with device.stream(outward=True):
        device.copy_to_host(there, host).wait()
    assert (host == 7).all()
    device.unpin(host)


@pytest.mark.parametrize("size", [4096, 20])
def test_a_digest_on_the_device_is_that_of_the_host(size: int) -> None:
    memory = torch.randint(0, 256, (1 << 20,), dtype=torch.uint8)
    offsets = np.arange(0, 64, dtype=np.int64) * 8192
    pieces = Pieces(offsets, np.full(64, size), np.array([1, 30, 64], np.int64))
    labels = np.zeros((3, 64), np.uint8)
    key = expand_key(b"secret")
    found = DeviceBytes(memory.cuda()).hash_units(key, pieces, labels)
    assert np.array_equal(found, hash_units(key, memory.numpy(), pieces, labels))
