"""Shared memory and a socket to each peer, for the ranks of a group that are on one host.

Nothing has a name in the file system that a killed process could leave behind: the sockets are
abstract ones with random names, and the memory is a memfd that travels over them.
"""

import hashlib
import mmap
import os
import secrets
import socket
import struct
from pathlib import Path

import torch
from torch import Tensor

from baton.core.errors import RankLost
from baton.parallel.group import Group

_TOKEN_BYTES = 16
_CREDENTIALS = struct.Struct("3i")


class HostLinks:
    """A socket to every peer, by place in the group, and bytes that all of them see."""

    def __init__(self, sockets: dict[int, socket.socket], memory: mmap.mmap) -> None:
        self.sockets = sockets
        self.memory: Tensor = torch.frombuffer(memory, dtype=torch.uint8)

    def __repr__(self) -> str:
        return f"<HostLinks to {sorted(self.sockets)}, {self.memory.numel()} bytes>"

    def close(self) -> None:
        """Close the sockets, which every peer notices."""
        for link in self.sockets.values():
            link.close()


def connect_on_host(group: Group, memory_bytes: int, deadline_s: float) -> HostLinks | None:
    """Connect the ranks of a group, or return None, on each of them, if they are on many hosts.

    Each of them calls it. Raises RankLost if a peer does not within the deadline.
    """
    token = secrets.token_bytes(_TOKEN_BYTES)
    sockets: dict[int, socket.socket] = {}
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(_address(token))
        listener.listen(group.size)
        listener.settimeout(deadline_s)
        told = torch.frombuffer(bytearray(host_id() + token), dtype=torch.uint8)[None]
        everyone = [bytes(row) for row in group.all_gather(told).numpy()]
        if len({row[:-_TOKEN_BYTES] for row in everyone}) > 1:
            return None
        try:
            for place in range(group.rank):
                sockets[place] = _called(everyone[place][-_TOKEN_BYTES:], group.rank, deadline_s)
            while len(sockets) < group.size - 1:
                _answer(listener, sockets, deadline_s)
            return HostLinks(sockets, _memory(group, sockets, memory_bytes))
        except OSError as error:
            for link in sockets.values():
                link.close()
            raise RankLost(f"a peer of {group} on this host did not connect: {error}") from error


def host_id() -> bytes:
    """Return 16 bytes that are the same in processes which can share memory, and in no others."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    network = os.stat("/proc/self/ns/net").st_ino  # abstract sockets are found within one
    return hashlib.sha256(f"{boot}{network} {os.getuid()}".encode()).digest()[:16]


def _address(token: bytes) -> bytes:
    return b"\0baton-ranks-" + token.hex().encode()


def _called(token: bytes, own_place: int, deadline_s: float) -> socket.socket:
    link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    link.settimeout(deadline_s)
    link.connect(_address(token))
    link.send(own_place.to_bytes(4, "little"))
    return link


def _answer(listener: socket.socket, sockets: dict[int, socket.socket], deadline_s: float) -> None:
    """Take one call; hang up on other users, who may also find the socket's name."""
    link, _ = listener.accept()
    link.settimeout(deadline_s)
    credentials = link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, user, _ = _CREDENTIALS.unpack(credentials)
    if user == os.getuid():
        sockets[int.from_bytes(link.recv(4), "little")] = link
    else:
        link.close()


def _memory(group: Group, sockets: dict[int, socket.socket], size: int) -> mmap.mmap:
    """Map memory that place 0 makes and hands to the others."""
    if group.rank == 0:
        fd = os.memfd_create("baton-ranks")
        os.ftruncate(fd, size)
        for link in sockets.values():
            socket.send_fds(link, [b"m"], [fd])
    else:
        _, [fd], _, _ = socket.recv_fds(sockets[0], 1, 1)
    try:
        return mmap.mmap(fd, size)
    finally:
        os.close(fd)
