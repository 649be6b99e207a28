"""A ticket opens what was offered under it, until that is taken back; over tcp the owner checks."""

import asyncio

import numpy as np
import pytest

from baton.core.errors import TransportError
from baton.core.ids import NO_TICKET, Ticket, new_incarnation
from baton.kernels.native.kv_digest import Ints
from baton.kv_transfer.grants import Grants
from baton.kv_transfer.link.transport import LinkTransport
from baton.kv_transfer.tcp.backend import TcpBackend
from baton.kv_transfer.transport import Run

from .transport_target import Bytes
from .transport_worlds import SECRET, pattern, region_of, soon

OURS, THEIRS = Ticket(b"a" * 16), Ticket(b"b" * 16)
SIZE = 8 << 20


def ints(*values: int) -> Ints:
    return np.array(values, np.int64)


def test_what_touches_opens_as_one() -> None:
    grants = Grants()
    grants.grant(OURS, ints(300, 0), ints(100, 100))
    assert grants.allow(OURS, ints(0, 350), ints(100, 50))
    assert not grants.allow(OURS, ints(0), ints(101))
    assert not grants.allow(OURS, ints(0, 299), ints(1, 1))
    grants.grant(OURS, ints(100, 50), ints(200, 10))
    assert grants.allow(OURS, ints(0, 0, 399), ints(400, 1, 1))
    assert not grants.allow(OURS, ints(0), ints(401))
    assert grants.refused == 3


def test_tickets_do_not_open_what_is_of_others_or_was_taken_back() -> None:
    grants = Grants()
    grants.grant(OURS, ints(0), ints(8))
    grants.grant(THEIRS, ints(8), ints(8))
    grants.grant(NO_TICKET, ints(), ints())
    assert grants.allow(THEIRS, ints(8), ints(8))
    for ticket, begin in ((OURS, 8), (THEIRS, 0), (NO_TICKET, 0)):
        assert not grants.allow(ticket, ints(begin), ints(1))
    grants.revoke(THEIRS)
    grants.revoke(THEIRS)
    assert not grants.allow(THEIRS, ints(8), ints(8))
    assert "1 tickets" in repr(grants)
    assert grants.tickets == 1
    grants.revoke(OURS)
    assert grants.tickets == 0


def opened(owner: str, memory: Bytes) -> LinkTransport:
    region, grants = region_of(memory), Grants()
    return LinkTransport(
        region,
        TcpBackend(region, "127.0.0.1", grants),
        owner=owner,
        incarnation=new_incarnation(),
        secret=SECRET.encode(),
        grants=grants,
    )


async def test_a_read_that_is_refused_ends_alone() -> None:
    """Large and small ones under way on the same connection; all others go on."""
    memory, source = np.ones(SIZE, np.uint8), pattern(1)
    reader, owner = opened("decode", memory), opened("prefill", source)
    peer = await soon(reader.add_peer(owner.metadata()))
    half = SIZE // 2
    owner.grant(OURS, ints(0), ints(half))
    scattered = [Run(half + 8 * i, half - 16 * (i + 1), 8) for i in range(1500)]
    reads = [
        (OURS, [Run(0, 0, half)], True),
        (THEIRS, [Run(half, 0, half)], False),
        (OURS, [Run(half, half - 8, 16)], False),
        (OURS, scattered, True),
        (NO_TICKET, [Run(SIZE - 8, 0, 8)], False),
    ]
    transfers = [reader.read(peer, runs, ticket=ticket) for ticket, runs, _ in reads]
    outcomes = await soon(asyncio.gather(*(t.wait() for t in transfers), return_exceptions=True))
    for outcome, (_, _, allowed) in zip(outcomes, reads, strict=True):
        assert isinstance(outcome, TransportError) != allowed, outcome
        if not allowed:
            assert "ticket does not open" in str(outcome)
    assert (memory[:half] == source[:half]).all()
    for run in scattered:
        got = memory[run.local_offset : run.local_offset + 8]
        assert (got == source[run.remote_offset : run.remote_offset + 8]).all()
    assert not memory[-8:].any(), "a refused read brings zeros"
    assert (owner.stats().refused, owner.stats().tickets_open) == (3, 1)
    owner.revoke(OURS)
    assert owner.stats().tickets_open == 0
    with pytest.raises(TransportError, match="not any more"):
        await soon(reader.read(peer, [Run(0, 0, 8)], ticket=OURS).wait())
    for transport in (reader, owner):
        await soon(transport.close())
        transport.check()
