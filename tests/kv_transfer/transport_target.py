"""A process whose memory the transport tests read: prints its metadata, lives until stdin closes.

Its argument is JSON: {"kind", "owner", "size" in bytes, "seed", "options" of UCX, "secret"}.
"""

import asyncio
import json
import sys

import numpy as np

from baton.core.config import HandoverConfig
from baton.core.ids import new_incarnation
from baton.kv_transfer.choose import open_transport
from baton.kv_transfer.cuda_ipc.backend import CudaIpcBackend
from baton.kv_transfer.cuda_ipc.late_driver import LateDriver
from baton.kv_transfer.link.backend import Backend
from baton.kv_transfer.link.transport import LinkTransport
from baton.kv_transfer.shm.backend import ShmBackend
from baton.kv_transfer.shm.memory import SharedMemory
from baton.kv_transfer.tcp.backend import TcpBackend
from baton.kv_transfer.transport import Region, Transport
from baton.kv_transfer.ucx.config import UcxConfig
from baton.kv_transfer.ucx.transport import UcxTransport

Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]


def pattern(seed: int, size: int) -> Bytes:
    """Return `size` bytes that follow from `seed` and are never 0."""
    return np.random.default_rng(seed).integers(1, 256, size, dtype=np.uint8)


def memory_of(kind: str, size: int) -> tuple[Bytes, Region]:
    """Return zeroed memory as `kind` likes it best, and the same as a region."""
    if kind in ("auto", "shm"):
        shared = SharedMemory(size)
        memory = np.frombuffer(shared.buffer, np.uint8)
        return memory, shared.region(memory)
    if kind == "cuda_ipc":
        driver = LateDriver(seed=size)
        there = driver.allocate(size)
        memory = np.frombuffer(there.buffer, np.uint8)
        return memory, Region(there.address, size, (there, memory), device=driver)
    memory = np.zeros(size, np.uint8)
    return memory, Region(memory.ctypes.data, memory.nbytes, memory)


async def opened(
    kind: str, region: Region, *, owner: str, secret: str, options: dict[str, str]
) -> Transport:
    """Open `auto`, `ucx`, `shm` (shared memory), `cma` (shm over ordinary memory), `tcp`, or
    `cuda_ipc` over memory that stands for a device's.
    """
    incarnation = new_incarnation()
    if kind == "auto":
        handover = HandoverConfig.checked(secret=secret, ucx_options=options)
        return await open_transport(
            region, handover, host="127.0.0.1", owner=owner, incarnation=incarnation
        )
    if kind == "ucx":
        config = UcxConfig(options=options)
        return await UcxTransport.open(region, owner=owner, incarnation=incarnation, config=config)
    backend: Backend = ShmBackend(region)
    if kind == "tcp":
        backend = TcpBackend(region, "127.0.0.1")
    elif kind == "cuda_ipc":
        backend = CudaIpcBackend(region)
    key = secret.encode()
    return LinkTransport(region, backend, owner=owner, incarnation=incarnation, secret=key)


async def main() -> None:
    """Serve until stdin closes."""
    wish = json.loads(sys.argv[1])
    memory, region = memory_of(wish["kind"], wish["size"])
    memory[:] = pattern(wish["seed"], wish["size"])
    transport = await opened(
        wish["kind"],
        region,
        owner=wish["owner"],
        secret=wish["secret"],
        options=wish["options"],
    )
    print(transport.metadata().hex(), flush=True)  # noqa: T201
    await asyncio.to_thread(sys.stdin.read)
    await transport.close()
    transport.check()


if __name__ == "__main__":
    asyncio.run(main())
