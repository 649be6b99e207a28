"""What is special to cuda_ipc, and CUDA's driver bound to a library that stands for libcuda."""

import ctypes
import subprocess
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from baton.core.errors import TransportError
from baton.core.ids import new_incarnation
from baton.kernels.native.build import NoNativeCode, find_compiler
from baton.kv_transfer.cuda_ipc.backend import CudaIpcBackend
from baton.kv_transfer.cuda_ipc.late_driver import LateDriver
from baton.kv_transfer.cuda_ipc.libcuda import CudaDriver, LibCuda, load
from baton.kv_transfer.device_driver import DeviceDriver
from baton.kv_transfer.link.transport import LinkTransport
from baton.kv_transfer.transport import Region, Run

from .transport_target import Bytes
from .transport_worlds import SECRET, soon

SIZE = 1 << 20
_allocated: list[Bytes] = []
"""Kept, as the library never forgets an address."""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> LibCuda:
    """libcuda.cpp, compiled and bound."""
    try:
        compiler = find_compiler()
    except NoNativeCode:
        pytest.skip("no compiler")
    path = tmp_path_factory.mktemp("cuda") / "libcuda.so"
    source = Path(__file__).with_name("libcuda.cpp")
    command = [compiler, "-std=c++17", "-shared", "-fPIC", "-Wall", "-o", str(path), str(source)]
    subprocess.run(command, check=True)
    return load(str(path))


def memory_of(library: LibCuda, size: int) -> Bytes:
    """Return memory that the library takes for the device's."""
    memory = np.random.default_rng(size).integers(1, 256, size, dtype=np.uint8)
    allocated = library._library.fake_allocated
    allocated.argtypes = (ctypes.c_uint64, ctypes.c_size_t)
    allocated(memory.ctypes.data, size)
    _allocated.append(memory)
    return memory


def left(library: LibCuda) -> int:
    """Return how many streams, events and mappings have not been given back."""
    return int(library._library.fake_left())


def transport_over(driver: DeviceDriver, memory: Bytes, owner: str) -> LinkTransport:
    """Return a transport over part of an allocation, which begins behind its first 4 KiB."""
    region = Region(memory.ctypes.data + 4096, memory.nbytes - 4096, memory, device=driver)
    return LinkTransport(
        region,
        CudaIpcBackend(region),
        owner=owner,
        incarnation=new_incarnation(),
        secret=SECRET.encode(),
    )


@pytest.fixture
async def pair(library: LibCuda) -> AsyncIterator[tuple[LinkTransport, LinkTransport, Bytes]]:
    """A reader, an owner and both their memories [2, SIZE]."""
    memories = [memory_of(library, SIZE), memory_of(library, SIZE + 4096)]
    memories[0][:] = 0
    launched: list[int] = []

    def copy_short(targets, sources, lengths, stream):  # type: ignore[no-untyped-def]
        launched.append(len(lengths))
        for row in zip(targets.tolist(), sources.tolist(), lengths.tolist(), strict=True):
            library.call("cuMemcpyAsync", *row, stream)

    sides = [
        transport_over(CudaDriver(0, library, copy_short), memory, owner)
        for memory, owner in zip(memories, ("decode", "prefill"), strict=True)
    ]
    yield sides[0], sides[1], memories
    for side in sides:
        await soon(side.close())
        side.check()
    assert launched == [64]
    assert left(library) == 0


async def test_short_runs_go_by_one_kernel_and_long_ones_by_copies(pair) -> None:  # type: ignore[no-untyped-def]
    ours, theirs, (memory, source) = pair
    peer = await soon(ours.add_peer(theirs.metadata()))
    runs = [Run(512 * i, 512 * (i ^ 1), 512) for i in range(64)]
    few = [Run(65536, 65536 * 3, 4096), Run(131072, 65536, 65536)]
    for wanted in (runs, few):
        report = await soon(ours.read(peer, wanted).wait())
        assert report.transport == "cuda_ipc"
    for run in (*runs, *few):
        here, there = 4096 + run.local_offset, 4096 + run.remote_offset
        assert (memory[here : here + run.length] == source[there : there + run.length]).all()


def test_what_the_driver_refuses_is_told_in_its_words(library: LibCuda) -> None:
    driver = CudaDriver(0, library, None)
    assert driver.identity == "GPU " + "07" * 16
    with pytest.raises(TransportError, match=r"cuDeviceGet: unknown \(101\)"):
        CudaDriver(1, library, None)
    with pytest.raises(TransportError, match="cuMemGetAddressRange_v2"):
        driver.export(64, 8)
    with pytest.raises(TransportError, match="CUDA_ERROR_INVALID_HANDLE"):
        driver.open(bytes(72), 8)
    with pytest.raises(TransportError, match="a handle of 3 bytes"):
        driver.open(b"abc", 8)
    memory = memory_of(library, SIZE)
    with pytest.raises(TransportError, match="not of one allocation"):
        driver.export(memory.ctypes.data + 8, SIZE)
    handle = driver.export(memory.ctypes.data + 8, SIZE - 8)
    with pytest.raises(TransportError, match="too few"):
        driver.open(handle, SIZE)
    assert left(library) == 0


def test_any_thread_may_use_the_driver(library: LibCuda) -> None:
    """A context is of a thread; every call makes the device's own current first."""
    driver, memory = CudaDriver(0, library, None), memory_of(library, SIZE)
    copied: list[bool] = []

    def work() -> None:
        lane, begin = driver.open_lane(), memory.ctypes.data
        place = [np.array([n], np.int64) for n in (begin + SIZE // 2, begin, 4096)]
        lane.copy(*place).wait()
        copied.append(bool((memory[:4096] == memory[SIZE // 2 :][:4096]).all()))
        lane.copy(*place)  # nobody waits for it
        lane.close()

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
        thread.join()
    assert copied == [True] * 3
    assert left(library) == 0


def test_no_driver_is_a_transport_error() -> None:
    with pytest.raises(TransportError, match="cannot be used"):
        load("/nowhere/libcuda.so.1")


async def test_the_fake_notices_what_is_unmapped_while_it_is_read() -> None:
    driver = LateDriver()
    ours, theirs = driver.allocate(4096), driver.allocate(4096)
    opened = driver.open(driver.export(theirs.address, 4096), 4096)
    lane = driver.open_lane()
    place = [np.array([n], np.int64) for n in (ours.address, opened.address, 4096)]
    event = lane.copy(*place)
    theirs.buffer[:] = b"x" * 4096
    assert ours.buffer[0] == 0, "it is late"
    with pytest.raises(AssertionError, match="unmapped while it is read"):
        opened.close()
    with pytest.raises(AssertionError, match="1 copies open"):
        driver.check()
    event.wait()
    assert ours.buffer[:] == b"x" * 4096
    lane.close()
    opened.close()
    driver.check()
    with pytest.raises(TransportError, match="not the device's"):
        driver.export(1, 1)


async def test_a_device_that_is_out_of_reach_is_named(library: LibCuda) -> None:
    driver, late = CudaDriver(0, library, None), LateDriver()
    memory = memory_of(library, SIZE)
    theirs = transport_over(driver, memory, "prefill")
    place = late.allocate(SIZE)
    region = Region(place.address, SIZE, place, device=late)
    ours = LinkTransport(
        region,
        CudaIpcBackend(region),
        owner="decode",
        incarnation=new_incarnation(),
        secret=SECRET.encode(),
    )
    with pytest.raises(TransportError, match=r"memory of GPU (07)+ on late device cannot be"):
        await soon(ours.add_peer(theirs.metadata()))
    for transport in (ours, theirs):
        await soon(transport.close())
        transport.check()
