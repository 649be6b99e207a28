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
from baton.kv_transfer.transport import Run
from baton.kv_transfer.ucx.capabilities import describe
from baton.kv_transfer.ucx.config import UcxConfig
from baton.kv_transfer.ucx.transport import UcxTransport

from .transport_worlds import SIZE, WORLDS, ProcessWorld, open_world, region_of, soon

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
    assert not found.has_cuda
