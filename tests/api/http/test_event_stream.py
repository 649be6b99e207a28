"""Streams that fall silent, over a send that is told by the test when to be slow."""

import asyncio
import json

import httpx
import openai
import pytest

from baton.api.http.event_stream import EventStream, TextEvents, sse_event
from baton.core.errors import Unavailable

CHAT = {"model": "demo", "messages": [{"role": "user", "content": "hi"}], "stream": True}
COMMENT = b": keep-alive\n\n"


class Client:
    """The receiving side of one answer."""

    def __init__(self) -> None:
        self.got: asyncio.Queue[dict] = asyncio.Queue()
        self.reads = asyncio.Event()
        self.reads.set()

    async def send(self, message: dict) -> None:
        await self.reads.wait()
        self.got.put_nowait(message)

    async def body(self) -> bytes:
        async with asyncio.timeout(60):
            message = await self.got.get()
        assert message["type"] == "http.response.body"
        return message["body"]


@pytest.mark.parametrize("text", ["", "a", 'a "quoted"\n\\', "\0", "\u2028 ü 🎈", '"\\u0000"'])
def test_an_event_that_was_encoded_before_is_as_one_that_was_not(text: str):
    def body(text: str) -> dict:
        return {"id": "é", "choices": [{"text": text, "finish_reason": None}], "usage": None}

    assert TextEvents(body).event(text) == sse_event(body(text))


async def test_silence_is_broken_before_the_first_event_and_after():
    client = Client()
    stream = EventStream(client.send, {"x-request-id": "a"})
    alive = asyncio.create_task(stream.keep_alive(0.001))
    async with asyncio.timeout(60):
        start = await client.got.get()
    assert (start["type"], start["status"]) == ("http.response.start", 200)
    assert (b"content-type", b"text/event-stream") in start["headers"]
    assert await client.body() == COMMENT
    await stream.send(b"data: 1\n\n")
    while (body := await client.body()) == COMMENT:
        pass
    assert body == b"data: 1\n\n"
    assert await client.body() == COMMENT
    await stream.fail(Unavailable("gone"))
    alive.cancel()
    while (body := await client.body()) == COMMENT:
        pass
    assert json.loads(body.removeprefix(b"data: "))["error"]["message"] == "gone"
    assert await client.body() == b""
    assert client.got.empty(), "nothing follows the end"


async def test_a_slow_reader_finds_one_comment_and_not_many():
    client = Client()
    stream = EventStream(client.send, {})
    await stream.send(b"data: 1\n\n")
    client.reads.clear()
    alive = asyncio.create_task(stream.keep_alive(0.0001))
    for _ in range(200):
        await asyncio.sleep(0)
    second = asyncio.create_task(stream.send(b"data: 2\n\n"))
    await asyncio.sleep(0)
    alive.cancel()
    client.reads.set()
    await second
    messages = [client.got.get_nowait() for _ in range(client.got.qsize())]
    sent = [message["body"] for message in messages if "body" in message]
    assert sent[0] == b"data: 1\n\n"
    assert sent[-1] == b"data: 2\n\n"
    assert sent.count(COMMENT) <= 1


async def test_an_error_before_all_else_has_its_status():
    client = Client()
    await EventStream(client.send, {}).fail(Unavailable("gone"))
    start = client.got.get_nowait()
    assert start["status"] == 503
    assert b"gone" in await client.body()


async def test_a_client_that_waits_for_its_first_token_sees_comments(
    make_front_door, leader, text_script
):
    leader.script = text_script("one two", hold_after=0)
    door = await make_front_door(sse_keep_alive_s=0.01)
    async with (
        httpx.AsyncClient(base_url=door.http_url, timeout=60) as http,
        http.stream("POST", "/v1/chat/completions", json=CHAT) as response,
    ):
        assert response.status_code == 200
        lines = response.aiter_lines()
        assert await anext(lines) == ": keep-alive"
        leader.resume()
        rest = [line async for line in lines if line and not line.startswith(":")]
    assert rest[-1] == "data: [DONE]"
    deltas = [json.loads(line[6:])["choices"][0]["delta"] for line in rest[:-1]]
    assert "".join(delta.get("content", "") for delta in deltas) == "one two"


@pytest.mark.parametrize("hold_after", [0, 1])
async def test_the_official_client_does_not_mind(make_front_door, leader, text_script, hold_after):
    leader.script = text_script("one two", hold_after=hold_after)
    door = await make_front_door(sse_keep_alive_s=0.01)
    async with openai.AsyncOpenAI(base_url=f"{door.http_url}/v1", api_key="x") as client:
        stream = await client.chat.completions.create(**CHAT)
        leader.resume()
        text = "".join([c.choices[0].delta.content or "" async for c in stream if c.choices])
    assert text == "one two"
