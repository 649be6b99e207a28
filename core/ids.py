"""Names for values that look alike and must never be mixed up."""

import secrets
from typing import NewType

RequestId = NewType("RequestId", str)
"""A request as its user sees it, for example `cmpl-4f1c…`."""
InstanceId = NewType("InstanceId", str)
"""One copy of the model in one role, for example `decode-0`."""
Incarnation = NewType("Incarnation", int)
"""Drawn afresh each time a process starts; every reference to its memory carries it."""
SeqId = NewType("SeqId", int)
"""A sequence inside one engine; never used twice by the same engine."""
BlockId = NewType("BlockId", int)
"""Index of a block in one KV pool, from 0 to num_blocks - 1."""
Epoch = NewType("Epoch", int)
"""How often a block has been freed; a reference with another epoch is stale."""
Ticket = NewType("Ticket", bytes)
"""The unguessable 128-bit name of one attempt of one handover."""
Attempt = NewType("Attempt", int)
"""The number of a try to hand one request over, from 0."""


def new_incarnation() -> Incarnation:
    """Draw an incarnation (63 bits, never 0)."""
    return Incarnation(secrets.randbits(63) | 1)


NO_TICKET = Ticket(bytes(16))
"""Opens nothing."""


def new_ticket() -> Ticket:
    """Draw a ticket (16 bytes)."""
    return Ticket(secrets.token_bytes(16))
