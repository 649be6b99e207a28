"""Chat over HTTP, by both clients, against a real gateway over real sockets."""

import asyncio
import ssl
from collections.abc import AsyncIterator

import pytest

from baton.client import (
    AsyncClient,
    Cancelled,
    Client,
    ClientTls,
    DeadlineExceeded,
    InvalidRequest,
    Message,
    Options,
    Overloaded,
    Retry,
    Unavailable,
)
from baton.client.http import AsyncHttpClient, HttpClient
from baton.core.errors import InvalidConfig

SOON = 60
TEXT = "def add(a, b):"
ALL = Options(max_tokens=50)
CHAT = [Message("system", "be brief"), Message("user", "hi")]


@pytest.fixture
async def client(front_door) -> AsyncIterator[AsyncHttpClient]:
    async with AsyncHttpClient(front_door.http_url, timeout_s=SOON) as client:
        yield client


async def test_a_chat_is_the_same_over_http_and_grpc(client, front_door, leader, tokenizer):
    options = Options(
        max_tokens=50, temperature=0.0, seed=7, stop=("never",), logit_bias={5: -1.0}, min_tokens=2
    )
    async with AsyncClient(front_door.grpc_address, timeout_s=SOON) as grpc:
        chunks = [chunk async for chunk in grpc.chat(CHAT, options)]
    stream = client.chat(CHAT, options)
    told = [chunk async for chunk in stream]
    assert "".join(chunk.text for chunk in told) == "".join(c.text for c in chunks) == TEXT
    assert stream.timing.ttft_s is not None
    assert stream.timing.tpot_s is not None
    first, second = (submit.request for submit in leader.submits)
    for request in (first, second):
        request.request_id = ""
    assert first == second
    ends = [(c.finish_reason, c.prompt_tokens, c.completion_tokens) for c in (told[-1], chunks[-1])]
    assert ends[0] == ends[1]
    assert await client.models() == {"demo": 256}


async def test_the_blocking_client_does_the_same(front_door, leader, tokenizer):
    def use() -> None:
        with HttpClient(f"{front_door.http_url}/v1/", timeout_s=SOON) as client:
            assert client.models() == {"demo": 256}
            whole = client.complete(CHAT, Options(max_tokens=50, n=2, timing=True))
            assert [choice.text for choice in whole.choices] == [TEXT, TEXT]
            assert whole.completion_tokens == 2 * len(tokenizer.encode(TEXT))
            [*_, last] = client.chat(CHAT, Options(timing=True))
            assert last.timing is not None
            assert sum(last.timing.spans_s.values()) == pytest.approx(last.timing.ttft_s, abs=1e-5)
        with Client(front_door.grpc_address, timeout_s=SOON) as grpc:
            assert "".join(chunk.text for chunk in grpc.chat(CHAT, ALL)) == TEXT
            with pytest.raises(InvalidRequest, match="messages"):
                grpc.chat([])

    await asyncio.to_thread(use)


async def test_closing_a_chat_cancels_its_request(client, front_door, leader, text_script):
    leader.script = text_script(TEXT, hold_after=1)
    async with client.chat(CHAT) as stream:
        assert (await anext(stream)).text == "def"
    async with asyncio.timeout(SOON):
        await front_door.gateway.idle()

    def use() -> None:
        with (
            HttpClient(front_door.http_url, timeout_s=SOON) as blocking,
            blocking.chat(CHAT) as chunks,
        ):
            assert next(chunks).text == "def"

    await asyncio.to_thread(use)
    async with asyncio.timeout(SOON):
        await front_door.gateway.idle()


async def test_what_the_server_says_is_raised(client, front_door, leader, text_script, until):
    with pytest.raises(InvalidRequest, match=r"temperature: 9\.0 is not allowed") as refused:
        await client.complete(CHAT, Options(temperature=9.0))
    assert refused.value.field == "temperature"
    leader.script = text_script(TEXT, hold_after=1)
    asked = asyncio.create_task(client.complete(CHAT))
    await until(lambda: leader.running == 1)
    call_id = leader.submits[0].request.request_id
    async with AsyncClient(front_door.grpc_address) as grpc:
        assert await grpc.cancel(call_id) == 1
    with pytest.raises(Cancelled):  # in the middle of the stream
        await asked
    with pytest.raises((DeadlineExceeded, Overloaded)):  # it may be too late from the beginning
        await client.complete(CHAT, timeout_s=0.05)


async def test_what_is_refused_for_now_is_sent_again(make_front_door, leader, text_script, until):
    leader.script = text_script(TEXT, hold_after=1)
    door = await make_front_door(max_open_requests=1, max_queued_requests=0)
    fast = Retry(attempts=50, backoff_s=0.0, max_backoff_s=60.0, budget=1000)
    async with (
        AsyncHttpClient(door.http_url, timeout_s=SOON, retry=Retry(attempts=1)) as once,
        AsyncHttpClient(door.http_url, timeout_s=SOON, retry=fast) as often,
    ):
        first = asyncio.create_task(once.complete(CHAT, ALL))
        await until(lambda: leader.running == 1)
        with pytest.raises(Overloaded) as refused:
            await once.complete(CHAT, ALL)
        assert refused.value.reason == "queue_full"
        assert refused.value.retry_after_s >= 1
        stream = often.chat(CHAT, ALL)
        second = asyncio.create_task(anext(stream))
        await until(lambda: stream.timing.attempts > 0)
        leader.resume()
        assert (await first).text == TEXT
        assert (await second).text == "def"
        await stream.aclose()


async def test_nobody_there_is_told_after_the_last_attempt():
    async with AsyncHttpClient(
        "http://127.0.0.1:1", timeout_s=SOON, retry=Retry(attempts=3, backoff_s=0.0)
    ) as client:
        stream = client.chat(CHAT)
        with pytest.raises(Unavailable):
            await anext(stream)
        assert stream.timing.attempts == 3
        with pytest.raises(Unavailable):
            await client.models()


@pytest.mark.parametrize("answer", [b"SSH-2.0-OpenSSH_9.6\r\n", b"", None])
async def test_who_is_no_gateway_is_unavailable(answer):
    whole = b"HTTP/1.1 200 OK\r\ncontent-length: 14\r\n\r\ndata: [1, 2]\n\n"

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(whole if answer is None else answer)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    async with server, AsyncHttpClient(url, retry=Retry(attempts=1), timeout_s=SOON) as client:
        with pytest.raises(Unavailable):
            await client.complete(CHAT)


def test_what_cannot_be_is_refused_before_anything_is_sent(tmp_path):
    with pytest.raises(InvalidConfig, match="url"):
        HttpClient("127.0.0.1:8000")
    with pytest.raises(InvalidConfig, match="resumes"):
        HttpClient("http://a", retry=Retry(resumes=True))
    with pytest.raises(InvalidConfig, match="PEM"):
        HttpClient("https://a", tls=ClientTls(tmp_path / "none.pem"))
    with HttpClient("http://127.0.0.1:1") as client:
        for chat, options in (([], ALL), (CHAT, Options(logprobs=1))):
            with pytest.raises(InvalidRequest):
                client.chat(chat, options)
    assert issubclass(ssl.SSLError, OSError), "so it is caught"
