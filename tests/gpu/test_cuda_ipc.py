"""Reads of one process's GPU memory by another; skipped where there is no CUDA."""

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import baton
from baton.core.errors import PeerLost
from baton.core.ids import new_incarnation
from baton.executor.cuda_device import CudaDevice
from baton.kv_transfer.cuda_ipc.backend import CudaIpcBackend
from baton.kv_transfer.link.transport import LinkTransport
from baton.kv_transfer.transport import Region, Run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SIZE = 64 << 20
SECRET = b"the secret of the test cluster"
SOON = 60


def opened(owner: str, device: CudaDevice, memory: torch.Tensor) -> LinkTransport:
    region = Region(memory.data_ptr(), memory.numel(), memory, device=device.driver)
    return LinkTransport(
        region, CudaIpcBackend(region), owner=owner, incarnation=new_incarnation(), secret=SECRET
    )


async def serve() -> None:
    """Own memory that counts up, until stdin closes."""
    device = CudaDevice()
    memory = device.allocate(SIZE)
    memory[:] = torch.arange(SIZE, device=memory.device) % 251
    torch.cuda.synchronize()
    transport = opened("prefill", device, memory)
    print(transport.metadata().hex(), flush=True)  # noqa: T201
    await asyncio.to_thread(sys.stdin.read)
    await transport.close()


def spawned() -> "subprocess.Popen[str]":
    """Start a process that serves."""
    source = str(Path(baton.__file__).parents[1])
    command = f"import sys; sys.path.insert(0, {source!r})\n"
    command += "import asyncio, tests.gpu.test_cuda_ipc as t; asyncio.run(t.serve())"
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", command], stdin=pipe, stdout=pipe, text=True)


@pytest.mark.parametrize(("length", "count"), [(SIZE // 2, 1), (32 << 10, 512), (20, 300)])
async def test_runs_long_and_short_arrive(length: int, count: int) -> None:
    owner = spawned()
    assert owner.stdout is not None
    device = CudaDevice()
    memory = device.allocate(SIZE)
    reader = opened("decode", device, memory)
    async with asyncio.timeout(SOON):
        line = await asyncio.to_thread(owner.stdout.readline)
        peer = await reader.add_peer(bytes.fromhex(line))
        runs = [Run(2 * i * length, (count - 1 - i) * length, length) for i in range(count)]
        report = await reader.read(peer, runs).wait()
        assert report.transport == "cuda_ipc"
        for run in runs:
            got = memory[run.local_offset :][:length].long()
            wanted = torch.arange(length, device=memory.device) + run.remote_offset
            assert got.equal(wanted % 251)
        owner.kill()
        owner.wait()
        with pytest.raises(PeerLost):
            await reader.read(peer, runs[:1]).wait()
        await reader.close()
    reader.check()
