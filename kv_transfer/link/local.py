"""Connections between processes of one host, by a name that nobody else can guess."""

import secrets
import socket
from pathlib import Path

import msgpack

from baton.core.errors import TransportError


def host_id() -> str:
    """Return what tells this host from others, and from itself before it was last started."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def listen_locally() -> tuple[socket.socket, bytes]:
    """Return a socket that listens in this network namespace, and its address for others.

    The name is abstract: nothing is left in the file system.
    """
    name = f"baton-kv-{secrets.token_hex(16)}"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(f"\0{name}")
    listener.listen(128)
    return listener, msgpack.packb([host_id(), name])


def dial_locally(address: bytes, timeout: float) -> socket.socket:
    """Connect; raises TransportError for an address that is none of this host, or OSError."""
    try:
        host, name = msgpack.unpackb(address)
        path = f"\0{name}"
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise TransportError("this is no address for a process of one host") from error
    if host != host_id():
        raise TransportError("the peer is on another host")
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(timeout)
    try:
        connection.connect(path)
    except OSError:
        connection.close()
        raise
    return connection


def until_hung_up(connection: socket.socket) -> None:
    """Return when the other side ends; it sends nothing."""
    while True:
        try:
            connection.recv(1)
        except BlockingIOError:
            continue
        return
