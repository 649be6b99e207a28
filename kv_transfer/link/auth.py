"""Both ends of a connection prove that they know the cluster's secret, before any byte is read.

    reader                                          owner of the memory
      hello: reader, owner, nonce  ───────────────▶
             ◀──────────── nonce, HMAC("owner", kind, hello, nonce)
      HMAC("reader", kind, hello, nonce)  ────────▶
             ◀──────────── welcome, or why not

The proofs are HMAC-SHA256 over everything said so far, so they hold for this connection, these two
processes and these incarnations only; the two roles keep a proof from being sent back to its
maker. The secret itself never travels. What follows on the connection is neither encrypted nor
signed: whoever can change packets between two hosts is not kept out; see docs/decisions/0010.
"""

import hmac
import secrets
import socket
import struct
from dataclasses import astuple, dataclass

import msgpack

from baton.core.errors import TransportError
from baton.kv_transfer.link.stream import receive_exactly

MIN_SECRET = 16
"""Bytes of a secret at least; a shorter one could be found by trying."""

_NONCE = 16
_PROOF = 32
_MAX_HELLO = 1024
_LENGTH = struct.Struct(">H")
_WELCOME, _NOT_ME = b"\x01", b"\x02"


@dataclass(frozen=True, slots=True)
class Parties:
    """Who wants to read whom."""

    reader: str
    reader_incarnation: int
    owner: str
    owner_incarnation: int


def prove_as_reader(
    connection: socket.socket, secret: bytes, kind: str, parties: Parties, deadline: float
) -> None:
    """Run the reader's side; `deadline` is on time.monotonic().

    Raises TransportError if the other side does not know the secret or is not `parties.owner`.
    """
    hello = msgpack.packb([*astuple(parties), secrets.token_bytes(_NONCE)])
    connection.sendall(_LENGTH.pack(len(hello)) + hello)
    answer = receive_exactly(connection, _NONCE + _PROOF, deadline)
    said = _said(kind, hello, answer[:_NONCE])
    if not hmac.compare_digest(answer[_NONCE:], _proof(secret, b"owner", said)):
        raise TransportError("it does not have this cluster's secret")
    connection.sendall(_proof(secret, b"reader", said))
    if receive_exactly(connection, 1, deadline) != _WELCOME:
        raise TransportError("another incarnation has taken its address")


def prove_as_owner(
    connection: socket.socket, secret: bytes, kind: str, owner: tuple[str, int], deadline: float
) -> Parties:
    """Run the side of `owner` (name, incarnation); return who reads.

    Raises TransportError if the reader does not know the secret, or looks for somebody else.
    """
    (length,) = _LENGTH.unpack(receive_exactly(connection, _LENGTH.size, deadline))
    if length > _MAX_HELLO:
        raise TransportError(f"a hello of {length} bytes; at most {_MAX_HELLO} are allowed")
    hello = receive_exactly(connection, length, deadline)
    nonce = secrets.token_bytes(_NONCE)
    said = _said(kind, hello, nonce)
    connection.sendall(nonce + _proof(secret, b"owner", said))
    proof = receive_exactly(connection, _PROOF, deadline)
    if not hmac.compare_digest(proof, _proof(secret, b"reader", said)):
        raise TransportError("a reader does not have this cluster's secret")
    *names, _ = msgpack.unpackb(hello)  # of a party that knows the secret
    parties = Parties(*names)
    if (parties.owner, parties.owner_incarnation) != owner:
        connection.sendall(_NOT_ME)
        raise TransportError(f"{parties.reader} looks for {parties.owner}, not for {owner[0]}")
    connection.sendall(_WELCOME)
    return parties


def _said(kind: str, hello: bytes, nonce: bytes) -> bytes:
    packed: bytes = msgpack.packb([kind, hello, nonce])
    return packed


def _proof(secret: bytes, role: bytes, said: bytes) -> bytes:
    return hmac.digest(secret, role + b" " + said, "sha256")
