import asyncio
import socket

import httpx
import pytest

from baton.api.serve import FrontDoor
from baton.core.errors import InvalidConfig


@pytest.fixture
def taken():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize("field", ["http_port", "grpc_port"])
async def test_a_port_in_use_is_named(make_gateway, taken, field):
    gateway = make_gateway(**{field: taken})
    with pytest.raises(InvalidConfig, match=f"{field}: {taken}") as refused:
        await FrontDoor.start(gateway)
    assert refused.value.field == field


@pytest.mark.parametrize("field", ["http_port", "grpc_port"])
async def test_two_front_doors_never_share_a_port(make_gateway, front_door, field):
    url = front_door.http_url if field == "http_port" else front_door.grpc_address
    port = int(url.rpartition(":")[2])
    with pytest.raises(InvalidConfig, match=f"{field}: {port}"):
        await FrontDoor.start(make_gateway(**{field: port}))


async def test_a_host_that_is_not_ours_is_named(make_gateway):
    with pytest.raises(InvalidConfig, match=r"192\.0\.2\.1"):
        await FrontDoor.start(make_gateway(host="192.0.2.1"))


async def test_the_same_port_serves_again_at_once(make_gateway, leader):
    port = 0
    for _ in range(3):
        gateway = make_gateway(http_port=port)
        await gateway.start()
        door = await FrontDoor.start(gateway)
        port = int(door.http_url.rpartition(":")[2])
        async with httpx.AsyncClient(base_url=door.http_url) as client:
            assert (await client.get("/health")).status_code == 200
            await door.close()
        gateway.check()


async def test_close_lets_an_open_stream_end_within_its_grace(
    make_gateway, leader, text_script, until
):
    leader.script = text_script("one two three", hold_after=1)
    gateway = make_gateway()
    await gateway.start()
    door = await FrontDoor.start(gateway)
    async with httpx.AsyncClient(base_url=door.http_url, timeout=20) as client:
        answer = asyncio.create_task(client.post("/v1/completions", json={"prompt": "hi"}))
        await until(lambda: leader.running == 1)
        closing = asyncio.create_task(door.close(grace_s=20))
        await until(lambda: gateway.health() != [])
        leader.resume()
        assert (await answer).json()["choices"][0]["text"] == "one two three"
        await closing
    gateway.check()


async def test_close_ends_an_open_stream_after_its_grace_with_an_error(
    make_gateway, leader, text_script, until
):
    leader.script = text_script("one two three", hold_after=1)
    gateway = make_gateway()
    await gateway.start()
    door = await FrontDoor.start(gateway)
    async with httpx.AsyncClient(base_url=door.http_url, timeout=20) as client:
        call = {"prompt": "hi", "stream": True}
        answer = asyncio.create_task(client.post("/v1/completions", json=call))
        await until(lambda: leader.running == 1)
        await door.close(grace_s=0)
        assert '"code":"unavailable"' in (await answer).text
    gateway.check()
