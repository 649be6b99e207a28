"""Clients that send slowly, take nothing or come in crowds, as raw sockets."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import httpx
import pytest

from baton.api.serve import FrontDoor

SOON = 60
BODY = {"prompt": "hi", "max_tokens": 200, "stream": True, "ignore_eos": True}
STREAM = BODY | {"logprobs": 5, "n": 16}
"""Its answer is far more than what fits between server and client."""


@asynccontextmanager
async def connected(
    door: FrontDoor, receive_bytes: int = 1 << 16
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Open a connection whose kernel, and whose own buffer, take little by themselves."""
    parts = urlsplit(door.http_url)
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        raw.setblocking(False)
        await asyncio.get_running_loop().sock_connect(raw, (parts.hostname, parts.port))
        reader, writer = await asyncio.open_connection(sock=raw, limit=receive_bytes)
        try:
            yield reader, writer
        finally:
            writer.transport.abort()


def post(body: dict[str, object], path: str = "/v1/completions") -> bytes:
    text = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(text)}\r\n\r\n".encode() + text


async def rest_of(reader: asyncio.StreamReader) -> bytes:
    """Read to the end of the connection, however it ends."""
    got = b""
    async with asyncio.timeout(SOON):
        try:
            while more := await reader.read(1 << 16):
                got += more
        except ConnectionError:
            pass
    return got


def cuts(door: FrontDoor, reason: str) -> float:
    lines = door.gateway.metrics.render().decode().splitlines()
    name = f'baton_connections_cut_total{{reason="{reason}"}} '
    return sum(float(line.removeprefix(name)) for line in lines if line.startswith(name))


# Readers


async def test_a_reader_who_takes_nothing_is_cut_and_nobody_else_is_slowed(
    make_front_door: Callable[..., object], leader, text_script, until
):
    leader.script = text_script("word " * 300)
    door = await make_front_door(limits={"reader_timeout_s": 1.0})
    async with (
        connected(door) as (_, writer),
        httpx.AsyncClient(base_url=door.http_url, timeout=SOON) as http,
    ):
        writer.transport.pause_reading()
        writer.write(post(STREAM))
        await until(lambda: len(leader.submits) == 16)
        others = [http.post("/v1/completions", json={"prompt": "x"}) for _ in range(50)]
        answers = await asyncio.gather(*others)
        assert [answer.status_code for answer in answers] == [200] * 50
        async with asyncio.timeout(SOON):
            await door.gateway.idle()
        await until(lambda: cuts(door, "slow_reader") == 1)
        assert leader.running == 0, "its requests are cancelled"


async def test_what_a_cut_reader_asked_for_is_cancelled_on_its_decode_instance(
    make_front_door, leader, text_script, until
):
    leader.script = text_script("word " * 300, hold_after=150)
    door = await make_front_door(limits={"reader_timeout_s": 1.0})
    async with connected(door) as (_, writer):
        writer.transport.pause_reading()
        writer.write(post(STREAM))
        await until(lambda: len(leader.submits) == 16)
        async with asyncio.timeout(SOON):
            await door.gateway.idle()  # held by the script: only a cancel can have ended them
        assert leader.running == 0
        assert leader.cancelled.qsize() == 16


async def test_a_slow_reader_who_takes_something_is_served(
    make_front_door, leader, text_script, until
):
    leader.script = text_script("word " * 300)
    door = await make_front_door(limits={"reader_timeout_s": 60.0})
    async with connected(door) as (reader, writer):
        writer.transport.pause_reading()
        writer.write(post(STREAM))
        await until(lambda: leader.running == 0 and len(leader.submits) == 16)
        assert door.gateway.stats().open_requests > 0, "not all of it was taken"
        writer.transport.resume_reading()
        got = b""
        async with asyncio.timeout(SOON):
            while not got.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
                got += await reader.read(1 << 12)
    assert cuts(door, "slow_reader") == 0


async def test_a_reader_who_does_not_take_the_end_of_its_answer_is_cut(
    make_front_door, leader, text_script, until
):
    leader.script = text_script("word " * 300)
    door = await make_front_door(limits={"reader_timeout_s": 0.5})
    async with connected(door, 1 << 12) as (_, writer):
        writer.transport.pause_reading()
        # Not streamed: all is written at once, and the request is over before it is read.
        writer.write(post(STREAM | {"stream": False}))
        await until(lambda: cuts(door, "slow_reader") == 1)


# Senders


@pytest.mark.parametrize("sent", [b"", b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"])
async def test_headers_that_do_not_come_in_time(make_front_door, sent):
    door = await make_front_door(limits={"header_timeout_s": 0.2})
    async with connected(door) as (reader, writer):
        writer.write(sent)
        answer = await rest_of(reader)
    assert answer.startswith(b"HTTP/1.1 408 ")
    error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    assert error["code"] == "request_timeout"
    assert cuts(door, "slow_sender") == 1


async def test_headers_that_trickle_have_one_deadline_for_all(make_front_door):
    door = await make_front_door(limits={"header_timeout_s": 0.3})
    async with connected(door) as (reader, writer):
        answer = asyncio.create_task(rest_of(reader))
        writer.write(b"GET /health HTTP/1.1\r\nx-drip: ")
        async with asyncio.timeout(SOON):
            while not answer.done():
                writer.write(b"x")
                await asyncio.sleep(0.01)
    assert b" 408 " in answer.result()


async def test_a_body_that_does_not_come_in_time(make_front_door):
    door = await make_front_door(limits={"body_timeout_s": 0.2, "header_timeout_s": 0.5})
    async with connected(door) as (reader, writer):
        writer.write(post(BODY)[:-5])
        answer = await rest_of(reader)  # and then the connection is closed
    assert answer.startswith(b"HTTP/1.1 408 ")


# Sizes and numbers


async def test_headers_that_are_too_large(make_front_door):
    door = await make_front_door(limits={"max_header_bytes": 2048})
    async with httpx.AsyncClient(base_url=door.http_url, timeout=SOON) as http:
        assert (await http.get("/health", headers={"x": "y" * 1000})).status_code == 200
        refused = await http.get("/health", headers={"x": "y" * 2048})
        assert refused.status_code in (400, 431)
        assert set(refused.json()["error"]) == {"message", "type", "param", "code"}


async def test_headers_that_are_too_large_and_never_end(make_front_door):
    door = await make_front_door(limits={"max_header_bytes": 2048})
    async with connected(door) as (reader, writer):
        writer.write(b"GET /health HTTP/1.1\r\nx: " + b"y" * 10_000)
        assert (await rest_of(reader)).startswith(b"HTTP/1.1 400 ")


async def test_a_body_that_is_too_large(make_front_door):
    door = await make_front_door(limits={"max_body_bytes": 2048})
    async with httpx.AsyncClient(base_url=door.http_url, timeout=SOON) as http:
        refused = await http.post("/v1/completions", json={"prompt": "x" * 3000})
        assert refused.status_code == 413
        assert "2048" in refused.json()["error"]["message"]


async def test_more_connections_than_allowed(make_front_door):
    door = await make_front_door(limits={"max_connections": 2})
    ask = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
    async with connected(door) as (one, first), connected(door) as (two, second):
        for reader, writer in ((one, first), (two, second)):
            writer.write(ask)
            assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
        async with connected(door) as (reader, _):
            answer = await rest_of(reader)
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"] == "server_error"
    async with asyncio.timeout(SOON):
        while True:  # once the server has seen the others go
            async with connected(door) as (reader, writer):
                writer.write(ask)
                if await reader.readline() == b"HTTP/1.1 200 OK\r\n":
                    break
