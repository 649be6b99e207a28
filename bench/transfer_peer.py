"""The other process of bench/transfer.py: it owns the memory and serves it in every way at once."""

import asyncio
import json
import socket
import struct
import sys
import threading

import numpy as np
import torch
import torch.distributed as dist

from baton.core.ids import new_incarnation
from baton.kv_transfer.link.transport import LinkTransport
from baton.kv_transfer.shm.backend import ShmBackend
from baton.kv_transfer.shm.memory import SharedMemory
from baton.kv_transfer.tcp.backend import TcpBackend
from baton.kv_transfer.transport import Region, Run, Transport
from baton.kv_transfer.ucx.config import UcxConfig
from baton.kv_transfer.ucx.transport import UcxTransport

SIZE = 256 << 20
SECRET = b"a secret for the time of a measurement"
COUNT = struct.Struct("=I")
UCX = {"ucx": {}, "ucx, TLS=tcp": {"TLS": "tcp,self"}}


def shared() -> tuple[SharedMemory, np.ndarray]:
    """Return SIZE bytes of shared memory whose pages are there, and the same as an array."""
    memory = SharedMemory(SIZE)
    array = np.frombuffer(memory.buffer, np.uint8)
    array[:] = 7
    return memory, array


async def transports(owner: str, region: Region) -> dict[str, Transport]:
    """Open every transport of Baton over one region, by the name in the table."""
    plain = Region(region.address, region.length, region.keepalive)
    opened: dict[str, Transport] = {}
    for name, options in UCX.items():
        opened[name] = await UcxTransport.open(
            region, owner=owner, incarnation=new_incarnation(), config=UcxConfig(options=options)
        )
    for name, backend in (
        ("shm, mapped", ShmBackend(region)),
        ("shm, by the kernel", ShmBackend(plain)),
        ("tcp", TcpBackend(region, "127.0.0.1")),
    ):
        opened[name] = LinkTransport(
            region, backend, owner=owner, incarnation=new_incarnation(), secret=SECRET
        )
    return opened


def listen(family: socket.AddressFamily) -> tuple[socket.socket, object]:
    """Return a bare listening socket and its address."""
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.bind(("127.0.0.1", 0) if family is socket.AF_INET else "")  # "" : a free name
    listener.listen()
    address = listener.getsockname()
    return listener, address if isinstance(address, tuple) else address.decode("latin-1")


def serve_raw(listener: socket.socket, memory: memoryview) -> None:
    """Send what is asked for, as fast as plain blocking sockets can."""
    connection, _ = listener.accept()
    while head := connection.recv(COUNT.size, socket.MSG_WAITALL):
        (count,) = COUNT.unpack(head)
        asked = connection.recv(16 * count, socket.MSG_WAITALL)
        pieces = [memory[a : a + n] for a, n in np.frombuffer(asked, "=u8").reshape(-1, 2).tolist()]
        while pieces:
            sent = connection.sendmsg(pieces)
            pieces = rest(pieces, sent)


def rest(pieces: list[memoryview], done: int) -> list[memoryview]:
    """Return what is left of `pieces` after `done` bytes."""
    for index, piece in enumerate(pieces):
        if done < len(piece):
            return [piece[done:], *pieces[index + 1 :]]
        done -= len(piece)
    return []


class RawReader:
    """Reads by plain blocking sockets, at most 1,024 runs at once."""

    def __init__(self, family: socket.AddressFamily, address: object, memory: memoryview) -> None:
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        where = tuple(address) if isinstance(address, list) else address.encode("latin-1")
        self._socket.connect(where)
        if family is socket.AF_INET:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._memory = memory

    async def read(self, runs: list[Run]) -> None:
        """Read and wait."""
        wanted = np.array([(run.remote_offset, run.length) for run in runs], "=u8")
        self._socket.sendall(COUNT.pack(len(runs)) + wanted.tobytes())
        memory = self._memory
        into = [memory[run.local_offset : run.local_offset + run.length] for run in runs]
        while into:
            into = rest(into, self._socket.recvmsg_into(into, 0, socket.MSG_WAITALL)[0])

    def close(self) -> None:
        """Let the other side end."""
        self._socket.close()


def join_gloo(rank: int, port: int) -> None:
    """Join the group of two."""
    where = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=2)


def serve_gloo(array: np.ndarray, port: int) -> None:
    """Send what is asked for over gloo; an empty request ends it."""
    join_gloo(1, port)
    tensor = torch.from_numpy(array)
    count = torch.zeros(1, dtype=torch.int64)
    while True:
        dist.recv(count, 0)
        if not count.item():
            break
        asked = torch.zeros((int(count), 2), dtype=torch.int64)
        dist.recv(asked, 0)
        for work in [dist.isend(tensor[a : a + n], 0) for a, n in asked.tolist()]:
            work.wait()
    dist.destroy_process_group()


class GlooReader:
    """Reads by send and receive over gloo."""

    def __init__(self, array: np.ndarray, port: int) -> None:
        join_gloo(0, port)
        self._tensor = torch.from_numpy(array)

    async def read(self, runs: list[Run]) -> None:
        """Read and wait."""
        dist.send(torch.tensor([len(runs)]), 1)
        dist.send(torch.tensor([(run.remote_offset, run.length) for run in runs]), 1)
        targets = [self._tensor[r.local_offset : r.local_offset + r.length] for r in runs]
        for work in [dist.irecv(target, 1) for target in targets]:
            work.wait()

    def close(self) -> None:
        """Let the other side end."""
        dist.send(torch.tensor([0]), 1)
        dist.destroy_process_group()


async def main() -> None:
    """Say how to be read, and serve until stdin closes."""
    memory, array = shared()
    opened = await transports("bench-peer", memory.region(array))
    view = memoryview(array)
    raw = {}
    for name, family in (("unix", socket.AF_UNIX), ("tcp", socket.AF_INET)):
        listener, raw[name] = listen(family)
        threading.Thread(target=serve_raw, args=[listener, view], daemon=True).start()
    gloo = threading.Thread(target=serve_gloo, args=[array, int(sys.argv[1])])
    gloo.start()
    metadata = {name: one.metadata().hex() for name, one in opened.items()}
    print(json.dumps({"metadata": metadata, "raw": raw}), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    gloo.join()
    for one in opened.values():
        await one.close()


if __name__ == "__main__":
    asyncio.run(main())
