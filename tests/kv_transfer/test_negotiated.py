"""Which of several transports a pair of processes uses, and what is said about it."""

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import msgpack
import numpy as np
import pytest
from structlog.testing import capture_logs

from baton.core.config import HandoverConfig
from baton.core.errors import InvalidConfig, PeerLost, TransportError
from baton.core.ids import NO_TICKET, Incarnation, new_incarnation
from baton.kv_transfer import choose
from baton.kv_transfer.choose import allocate, open_device_transport, open_transport
from baton.kv_transfer.cuda_ipc.late_driver import LateDriver
from baton.kv_transfer.link.local import host_id
from baton.kv_transfer.transport import Metadata, Region, Run, Transport
from baton.kv_transfer.ucx.capabilities import UcxCapabilities, UcxDevice

from .transport_worlds import SECRET, pattern, region_of, soon

SIZE = 1 << 16
WHOLE = [Run(0, 0, SIZE)]
Open = Callable[..., Awaitable[Transport]]
WITH_RDMA = UcxCapabilities("1.22.0", "libucp.so", (UcxDevice("rc_mlx5", "mlx5_0:1"),))


@pytest.fixture
async def side() -> AsyncIterator[Open]:
    """Opens a transport over `memory`; closes and checks all at the end."""
    opened: list[Transport] = []

    async def open_side(
        owner: str,
        memory: "np.ndarray[tuple[int], np.dtype[np.uint8]]",
        incarnation: Incarnation | None = None,
        **options: object,
    ) -> Transport:
        config = HandoverConfig.checked(**({"secret": SECRET} | options))
        transport = await soon(
            open_transport(
                region_of(memory),
                config,
                host="127.0.0.1",
                owner=owner,
                incarnation=incarnation or new_incarnation(),
            )
        )
        opened.append(transport)
        transport.grant(NO_TICKET, np.array([0]), np.array([memory.nbytes]))  # to everybody
        return transport

    yield open_side
    for transport in opened:
        transport.revoke(NO_TICKET)
        await soon(transport.close())
        transport.check()


def zeros() -> "np.ndarray[tuple[int], np.dtype[np.uint8]]":
    return np.zeros(SIZE, np.uint8)


def source() -> "np.ndarray[tuple[int], np.dtype[np.uint8]]":
    return pattern(3)[:SIZE].copy()


@pytest.mark.parametrize(
    ("ours", "theirs", "carrier", "reason"),
    [
        ("auto", "auto", "shm-cma", None),
        ("auto", "shm", "shm-cma", None),
        ("shm", "auto", "shm-cma", None),
        ("tcp", "auto", "tcp", None),
        ("auto", "tcp", "tcp", "shm: the peer does not offer it"),
    ],
)
async def test_the_first_that_both_have_is_used(
    side: Open, ours: str, theirs: str, carrier: str, reason: str | None
) -> None:
    memory = zeros()
    reader = await side("decode", memory, transport=ours)
    target = await side("prefill", source(), transport=theirs)
    with capture_logs() as logs:
        peer = await soon(reader.add_peer(target.metadata()))
        report = await soon(reader.read(peer, WHOLE).wait())
    assert (memory == source()).all()
    assert report.transport == carrier
    assert reader.stats().fallbacks == (reason is not None)
    assert reader.stats().bytes_read == {carrier: SIZE}
    said = [line["reason"] for line in logs if line["event"] == "transport.fallback"]
    assert said == ([] if reason is None else [reason])


async def test_ucx_is_opened_where_it_has_rdma(
    side: Open, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """This machine's UCX has none, but it is asked as it would be there."""
    with monkeypatch.context() as patched:
        patch_rdma(patched, tmp_path)
        reader = await side("decode", zeros())
        target = await side("prefill", source())
    offers = msgpack.unpackb(Metadata.unpack(target.metadata(), "negotiated").key)
    assert [kind for kind, _ in offers] == ["shm", "ucx", "tcp"]
    peer = await soon(reader.add_peer(target.metadata()))
    assert (await soon(reader.read(peer, WHOLE).wait())).transport == "shm-cma"


async def test_ucx_is_not_opened_without_rdma(
    side: Open, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(choose, "_RDMA_DEVICES", tmp_path)
    target = await side("prefill", source())
    offers = msgpack.unpackb(Metadata.unpack(target.metadata(), "negotiated").key)
    assert [kind for kind, _ in offers] == ["shm", "tcp"]


async def test_two_with_nothing_in_common_say_so(side: Open) -> None:
    reader = await side("decode", zeros(), transport="shm")
    target = await side("prefill", source(), transport="tcp")
    with pytest.raises(TransportError, match=r"no transport reaches prefill; shm: .*not offer it"):
        await soon(reader.add_peer(target.metadata()))
    assert reader.stats().peers == 0


async def test_ucx_with_nothing_but_tcp_is_a_fallback(side: Open) -> None:
    options = {"transport": "ucx", "ucx_options": {"TLS": "tcp,self"}}
    reader = await side("decode", zeros(), **options)
    target = await side("prefill", source(), **options)
    peer = await soon(reader.add_peer(target.metadata()))
    for _ in range(3):
        assert (await soon(reader.read(peer, WHOLE).wait())).transport == "tcp"
    assert await soon(reader.add_peer(target.metadata())) is peer
    assert reader.stats().fallbacks == 1


async def test_ucx_with_nothing_but_tcp_gives_way_to_tcp(
    side: Open, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As where both have RDMA, but not to each other."""
    memory = zeros()
    with monkeypatch.context() as patched:
        patch_rdma(patched, tmp_path)
        reader = await side("decode", memory, ucx_options={"TLS": "tcp"})
        target = await side("prefill", source(), ucx_options={"TLS": "tcp"})
    theirs = elsewhere(target.metadata())
    peer = await soon(reader.add_peer(theirs))
    await soon(reader.read(peer, WHOLE).wait())
    again = await soon(reader.add_peer(theirs))
    assert again is not peer
    memory[:] = 0
    await soon(reader.read(again, WHOLE).wait())
    assert (memory == source()).all()
    assert reader.stats().bytes_read == {"tcp": 2 * SIZE}
    assert reader.stats().fallbacks == 2
    assert not reader.stats().transfers_failed


async def test_without_a_secret_only_ucx_is_there(side: Open) -> None:
    with capture_logs() as logs:
        reader = await side("decode", zeros(), secret="")
    left_out = {line["kind"] for line in logs if line["event"] == "transport.left_out"}
    assert left_out == {"shm", "tcp"}
    target = await side("prefill", source(), secret="")
    peer = await soon(reader.add_peer(target.metadata()))
    assert (await soon(reader.read(peer, WHOLE).wait())).transport == "cma"
    with pytest.raises(InvalidConfig, match=r"handover\.secret"):
        await side("other", zeros(), secret="", transport="tcp")


async def test_a_kind_that_lost_every_read_is_tried_last(
    side: Open, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """UCX says only by a failing read that it does not reach a peer; this one cannot be reached."""
    memory = zeros()
    options = {"ucx_options": {"TLS": "tcp"}}
    with monkeypatch.context() as patched:
        patch_rdma(patched, tmp_path)
        reader = await side("decode", memory, **options)
        target = await side("prefill", source(), **options)
    gone = await side("prefill", source(), transport="ucx", **options)
    await soon(gone.close())
    theirs = elsewhere(with_offer_of(target.metadata(), "ucx", gone.metadata()))
    peer = await soon(reader.add_peer(theirs))
    with pytest.raises(PeerLost):
        await soon(reader.read(peer, WHOLE).wait())
    again = await soon(reader.add_peer(theirs))
    assert (await soon(reader.read(again, WHOLE).wait())).transport == "tcp"
    assert (memory == source()).all()
    assert reader.stats().fallbacks == 1


def elsewhere(metadata: bytes) -> bytes:
    """Return `metadata` as if its owner ran on another host."""
    packed = Metadata.unpack(metadata, "negotiated")
    return replace(packed, address=b"elsewhere").pack("negotiated")


def patch_rdma(patched: pytest.MonkeyPatch, devices: Path) -> None:
    """Let this machine have an RDMA device, and its UCX one that could use it."""
    (devices / "mlx5_0").touch()
    patched.setattr(choose, "_RDMA_DEVICES", devices)
    patched.setattr(choose, "describe", lambda config: WITH_RDMA)


def with_offer_of(metadata: bytes, kind: str, other: bytes) -> bytes:
    """Return `metadata` with what `other` offers as `kind`."""
    packed = Metadata.unpack(metadata, "negotiated")
    foreign = dict(msgpack.unpackb(Metadata.unpack(other, "negotiated").key))
    offers = [[k, foreign[k] if k == kind else v] for k, v in msgpack.unpackb(packed.key)]
    fields = (packed.owner, packed.incarnation, packed.base, packed.length, packed.address)
    return Metadata(*fields, msgpack.packb(offers)).pack("negotiated")


async def test_a_new_incarnation_may_come_by_another_way(side: Open) -> None:
    memory = zeros()
    reader = await side("decode", memory)
    first = await side("prefill", source())
    old = await soon(reader.add_peer(first.metadata()))
    second = await side("prefill", source(), transport="tcp")
    new = await soon(reader.add_peer(second.metadata()))
    with pytest.raises(PeerLost, match="removed"):
        await soon(reader.read(old, WHOLE).wait())
    assert (await soon(reader.read(new, WHOLE).wait())).transport == "tcp"
    with pytest.raises(TransportError, match="replaced by a newer one"):
        await soon(reader.add_peer(first.metadata()))
    assert reader.stats().peers == 1


async def test_shm_is_not_missed_on_another_host(side: Open) -> None:
    reader = await side("decode", zeros(), transport="shm")
    target = await side("prefill", source())
    packed = Metadata.unpack(target.metadata(), "negotiated")
    assert packed.address == host_id().encode()
    with pytest.raises(TransportError, match="no transport reaches prefill"):
        await soon(reader.add_peer(elsewhere(target.metadata())))
    assert reader.stats().fallbacks == 0


def test_memory_is_shared_where_a_reader_may_map_it() -> None:
    shared = allocate(4096, HandoverConfig(transport="auto"))
    assert shared is not None
    region = shared.region("kept")
    assert (region.length, region.fd) == (4096, shared.fd)
    assert allocate(4096, HandoverConfig(transport="tcp")) is None


@pytest.mark.parametrize(
    ("transport", "secret", "kinds"),
    [
        ("auto", SECRET, ["cuda_ipc"]),
        ("auto", "", None),
        ("ucx", SECRET, None),  # here UCX finds no GPU
        ("shm", SECRET, None),  # staging is asked for
    ],
)
async def test_pools_on_devices_are_read_by_what_can(
    transport: str, secret: str, kinds: list[str] | None
) -> None:
    driver = LateDriver()
    memory = driver.allocate(4096)
    opened = await open_device_transport(
        Region(memory.address, 4096, memory, device=driver),
        HandoverConfig.checked(transport=transport, secret=secret),
        host="127.0.0.1",
        owner="decode",
        incarnation=new_incarnation(),
    )
    if kinds is None:
        assert opened is None
        return
    assert opened is not None
    assert opened.ways == tuple(f"{kind} {host_id()}" for kind in kinds)
    await soon(opened.close())
    opened.check()
