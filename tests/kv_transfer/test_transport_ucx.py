"""What is special to UCX."""

import asyncio
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from baton.core.errors import InvalidConfig, TransportError
from baton.core.ids import new_incarnation
from baton.kv_transfer.cuda_ipc.late_driver import LateDriver
from baton.kv_transfer.transport import Region, Run
from baton.kv_transfer.ucx import session, worker
from baton.kv_transfer.ucx.capabilities import UcxCapabilities, UcxDevice, describe
from baton.kv_transfer.ucx.config import UcxConfig
from baton.kv_transfer.ucx.endpoint import Endpoint
from baton.kv_transfer.ucx.transport import UcxTransport

from .transport_worlds import SIZE, WORLDS, ProcessWorld, open_world, pattern, region_of, soon

WHOLE = [Run(0, 0, SIZE)]


@pytest.fixture
async def ucx_tcp() -> AsyncIterator[ProcessWorld]:
    world = await ProcessWorld(*WORLDS["ucx-tcp"]).open()
    yield world
    await world.close()


async def test_ucx_refuses_more_than_it_can_queue() -> None:
    memory = np.zeros(SIZE, np.uint8)
    reader = await soon(
        UcxTransport.open(
            region_of(memory),
            owner="decode",
            incarnation=new_incarnation(),
            config=UcxConfig(max_queued=1, options={"TLS": "self,tcp"}),
        )
    )
    peer = await soon(reader.add_peer(reader.metadata()))
    runs = [Run(0, SIZE // 2, 8)]
    with pytest.raises(TransportError, match="1 transfers wait"):
        # The thread is quick, but a loop that never waits is quicker.
        [reader.read(peer, runs) for _ in range(100_000)]
    await soon(reader.close())
    reader.check()


async def test_a_bug_while_connecting_is_told_to_who_waits(
    ucx_tcp: ProcessWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object) -> None:
        raise ValueError("a bug")

    metadata = await ucx_tcp.start_target(1)
    with monkeypatch.context() as patched:
        patched.setattr(Endpoint, "open", broken)
        with pytest.raises(TransportError, match="a bug"):
            await soon(ucx_tcp.reader.add_peer(metadata))
    peer = await soon(ucx_tcp.reader.add_peer(metadata))
    await soon(ucx_tcp.reader.read(peer, WHOLE).wait())


async def test_a_bug_while_reads_are_posted_is_told_once_those_that_began_have_completed(
    ucx_tcp: ProcessWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(ucx_tcp.reader, UcxTransport)
    lib = ucx_tcp.reader._worker._session.lib
    read, calls = lib.ucp_get_nbx, iter(range(9))

    def broken(*arguments: object) -> object:
        if next(calls) == 1:
            raise ValueError("a bug")
        return read(*arguments)

    peer = await soon(ucx_tcp.reader.add_peer(await ucx_tcp.start_target(1)))
    half = SIZE // 2
    with monkeypatch.context() as patched:
        patched.setattr(lib, "ucp_get_nbx", broken)
        with pytest.raises(TransportError, match="a bug"):
            await soon(ucx_tcp.reader.read(peer, [Run(0, half, half), Run(half, 0, half)]).wait())
    assert (ucx_tcp.memory[:half] == pattern(1)[half:]).all(), "it failed before its fence"
    await soon(ucx_tcp.reader.read(peer, WHOLE).wait())


async def test_what_does_not_settle_is_left_and_not_destroyed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """UCX ends the process if its worker is destroyed over lanes that are still taken down."""
    world = await ProcessWorld(*WORLDS["ucx-cma"]).open()
    peer = await soon(world.reader.add_peer(await world.start_target(1)))
    transfers = [world.reader.read(peer, WHOLE) for _ in range(50)]
    left = len(session._left)
    with monkeypatch.context() as patched:
        patched.setattr(worker, "_SETTLE_S", 0.1)
        patched.setattr(session.Session, "settle", lambda self: False)
        await soon(world.reader.close())
    assert all(transfer.completed for transfer in transfers)
    assert len(session._left) == left + 1
    await world.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_nobody_waits_for_a_session_that_cannot_be_closed(
    ucx_tcp: ProcessWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object) -> None:
        raise ValueError("a bug")

    peer = await soon(ucx_tcp.reader.add_peer(await ucx_tcp.start_target(1)))
    monkeypatch.setattr(session.Session, "close", broken)
    await soon(ucx_tcp.reader.close())
    await soon(ucx_tcp.reader.remove_peer(peer))


@pytest.mark.parametrize("kind", ["ucx-cma", "ucx-tcp"])
async def test_ucx_sleeps_when_idle(kind: str) -> None:
    world = await open_world(kind)
    peer = await soon(world.reader.add_peer(await world.start_target(1)))
    await soon(world.reader.read(peer, WHOLE).wait())
    before = time.process_time()
    await asyncio.sleep(1)  # the span that is measured
    assert time.process_time() - before < 0.2
    await world.close()


async def test_ucx_listens_on_loopback_only_if_the_host_is_loopback(ucx_tcp: ProcessWorld) -> None:
    await soon(ucx_tcp.reader.add_peer(await ucx_tcp.start_target(1)))
    addresses = _listening(os.getpid()) | _listening(ucx_tcp.target.pid)
    assert addresses == {"0100007F"}


def _listening(pid: int) -> set[str]:
    """Return the IPv4 addresses, in hex as Linux writes them, on which process `pid` listens."""
    links = (os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir() if fd.is_symlink())
    inodes = {link[8:-1] for link in links if link.startswith("socket:")}
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return {row[1].split(":")[0] for row in rows if row[3] == "0A" and row[9] in inodes}


async def test_ucx_says_which_setting_it_refuses() -> None:
    for options, match in (
        ({"NO_SUCH_THING": "1"}, "set NO_SUCH_THING=1: Invalid parameter"),
        ({"TLS": "none-such"}, "open a context: No such device"),
    ):
        region = region_of(np.zeros(SIZE, np.uint8))
        config = UcxConfig(options=options)
        with pytest.raises(TransportError, match=match):
            await UcxTransport.open(region, owner="x", incarnation=new_incarnation(), config=config)


def test_ucx_settings_of_the_user_win(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"TLS": "tcp", "RNDV_THRESH": "8k"}
    assert UcxConfig(options=options).settings()["RNDV_THRESH"] == "8k"
    assert UcxConfig().settings()["NET_DEVICES"] == "lo"
    assert "NET_DEVICES" not in UcxConfig(host="10.0.0.7").settings()
    monkeypatch.setenv("UCX_TLS", "all")
    monkeypatch.setenv("UCX_RNDV_THRESH", "1k")
    assert not {"TLS", "RNDV_THRESH"} & UcxConfig(options=options).settings().keys()
    with pytest.raises(InvalidConfig, match="without UCX_"):
        UcxConfig(options={"UCX_TLS": "tcp"})


def test_ucx_describes_itself() -> None:
    found = describe(UcxConfig(options={"TLS": "cma,tcp"}))
    assert found.version.count(".") == 2
    assert Path(found.library).exists()
    assert set(found.transports) == {"cma", "tcp"}
    assert [device.device for device in found.devices if device.transport == "tcp"] == ["lo"]
    assert not found.has_verbs
    assert not found.moves_cuda
    assert not found.cuda_transports


def test_transports_for_gpus_are_told_apart() -> None:
    names = ("cuda_copy", "cuda_ipc", "gdr_copy", "rc_mlx5", "tcp", "cma")
    devices = tuple(UcxDevice(name, "any") for name in names)
    found = UcxCapabilities("1.22", "libucp.so", devices, moves_cuda=True)
    assert found.cuda_transports == names[:3]
    assert found.has_verbs


async def test_ucx_says_so_if_it_cannot_move_the_memory_of_gpus() -> None:
    """What stands for a GPU here is no memory that UCX could tell from the host's."""
    driver = LateDriver()
    memory = driver.allocate(4096)
    region = Region(memory.address, 4096, memory, device=driver)
    with pytest.raises(TransportError, match="memory of GPUs"):
        await UcxTransport.open(
            region, owner="x", incarnation=new_incarnation(), config=UcxConfig()
        )
