import pytest
import torch

from baton.executor.late_device import LateDevice


def test_nothing_has_moved_until_somebody_waits() -> None:
    device, host = LateDevice(), torch.arange(8, dtype=torch.uint8)
    device.pin(host)
    there = device.allocate(8)
    event = device.copy_from_host(host, there)
    assert not there.any()
    assert "1 copies open" in repr(device)
    event.wait()
    event.wait()
    assert there.equal(host)
    back = device.copy_to_host(there[:4], host[4:])
    with pytest.raises(AssertionError, match="1 copies open"):
        device.check()
    device.synchronize()
    back.wait()
    assert host.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    with pytest.raises(AssertionError, match="still pinned"):
        device.check()
    device.unpin(host)
    device.check()


def test_copies_overtake_each_other_by_the_seed() -> None:
    def completed_first(seed: int) -> list[int]:
        device, host = LateDevice(seed), torch.arange(1, 9, dtype=torch.uint8)
        device.pin(host)
        there = device.allocate(8)
        events = [device.copy_from_host(host[n : n + 1], there[n : n + 1]) for n in range(8)]
        events[3].wait()
        return there.tolist()

    assert all(completed_first(seed)[3] == 4 for seed in range(10))
    assert len({tuple(completed_first(seed)) for seed in range(10)}) > 1
    assert completed_first(4) == completed_first(4)


def test_memory_of_the_wrong_kind_is_a_bug() -> None:
    device, host = LateDevice(), torch.zeros(8, dtype=torch.uint8)
    there = device.allocate(8)
    with pytest.raises(AssertionError, match="to host memory that is not pinned"):
        device.copy_to_host(there, host)
    with pytest.raises(AssertionError, match="from host memory that is not pinned"):
        device.copy_from_host(host, there)
    device.pin(host)
    with pytest.raises(AssertionError, match="not the device's"):
        device.copy_from_host(host, host.clone())
    with pytest.raises(AssertionError, match="unequal sizes"):
        device.copy_from_host(host[:4], there)
