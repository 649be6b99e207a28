"""Both clients against a real gateway over real sockets."""

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest

from baton.client import (
    AsyncClient,
    BatonError,
    Cancelled,
    Chunk,
    Client,
    InvalidRequest,
    Message,
    Options,
    Overloaded,
    Retry,
    Unavailable,
)
from baton.core.request import TokenLogprobs

SOON = 60
TEXT = "def add(a, b):"
ALL = Options(max_tokens=50)
FAST = Retry(attempts=50, backoff_s=0.0, max_backoff_s=60.0, budget=1000)


@pytest.fixture
async def client(front_door) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(front_door.grpc_address, timeout_s=SOON) as client:
        yield client


async def test_the_async_client_streams_completes_and_counts(client, leader, tokenizer):
    assert "".join([text async for text in client.generate("hi", ALL)]) == TEXT
    stream = client.stream([1, 2, 3], ALL)
    chunks = [chunk async for chunk in stream]
    assert [token for chunk in chunks for token in chunk.token_ids] == tokenizer.encode(TEXT)
    assert stream.timing.ttft_s is not None
    assert stream.timing.attempts == 1
    assert chunks[-1].timing is None
    [*_, last] = [chunk async for chunk in client.stream("hi", Options(timing=True))]
    assert sum(last.timing.spans_s.values()) == pytest.approx(last.timing.ttft_s)
    whole = await client.complete("hi", Options(max_tokens=50, n=2, logprobs=1))
    assert [choice.text for choice in whole.choices] == [TEXT, TEXT]
    assert whole.choices[0].logprobs[0] == TokenLogprobs(-0.5, ((1000, 0.0),))
    assert whole.completion_tokens == 2 * len(tokenizer.encode(TEXT))


async def test_a_chat_goes_through_the_models_template(client, front_door, leader, tokenizer):
    chat = [Message("system", "be brief"), Message("user", "hi")]
    assert (await client.complete(chat, ALL)).text == TEXT
    sent = [{"role": message.role, "content": message.content} for message in chat]
    assert list(leader.submits[0].request.prompt) == tokenizer.apply_chat_template(sent)
    with pytest.raises(InvalidRequest, match="role"):
        await client.complete([Message("nobody", "hi")])

    def use() -> str:
        with Client(front_door.grpc_address, timeout_s=SOON) as blocking:
            return blocking.complete(chat, ALL).text

    assert await asyncio.to_thread(use) == TEXT


@pytest.mark.parametrize("prompt", [["a", 1], [Message("user", "hi"), 1], [2**40], [-1]])
async def test_what_no_message_can_hold_is_refused_before_it_is_sent(client, leader, prompt):
    with pytest.raises(InvalidRequest):
        await client.complete(prompt)
    assert not leader.submits


async def test_tokens_models_and_cancel(client, front_door, leader, text_script, tokenizer):
    assert await client.tokenize(TEXT) == tokenizer.encode(TEXT)
    assert await client.detokenize(tokenizer.encode(TEXT)) == TEXT
    assert await client.models() == {"demo": 256}
    assert await client.explain("gen-x") is None
    leader.script = text_script(TEXT, hold_after=1)
    stream = client.stream("hi")
    first = await anext(stream)
    assert await client.cancel(first.request_id) == 1
    with pytest.raises(Cancelled):
        await anext(stream)
    told = await client.explain(first.request_id)
    assert told is not None
    assert told["request_id"] == first.request_id
    assert await client.cancel(first.request_id) == 0

    def use() -> tuple[list[int], str, int]:
        with Client(front_door.grpc_address, timeout_s=SOON) as blocking:
            tokens = blocking.tokenize(TEXT)
            return tokens, blocking.detokenize(tokens), blocking.cancel("gen-x")

    assert await asyncio.to_thread(use) == (tokenizer.encode(TEXT), TEXT, 0)


async def test_closing_a_stream_cancels_its_request(client, front_door, leader, text_script):
    leader.script = text_script(TEXT, hold_after=1)
    async with client.stream("hi") as stream:
        assert (await anext(stream)).text == "def"
    async with asyncio.timeout(SOON):
        await front_door.gateway.idle()


async def test_what_is_refused_for_now_is_sent_again_until_there_is_room(
    make_front_door, leader, text_script, until
):
    leader.script = text_script(TEXT, hold_after=1)
    door = await make_front_door(max_open_requests=1, max_queued_requests=0)
    async with (
        AsyncClient(door.grpc_address, timeout_s=SOON, retry=Retry(attempts=1)) as once,
        AsyncClient(door.grpc_address, timeout_s=SOON, retry=FAST) as often,
    ):
        first = asyncio.create_task(once.complete("hi", ALL))
        await until(lambda: leader.running == 1)
        with pytest.raises(Overloaded) as refused:
            await once.complete("hi", ALL)
        assert refused.value.retry_after_s > 0
        stream = often.stream("hi", ALL)
        second = asyncio.create_task(anext(stream))
        await until(lambda: stream.timing.attempts > 0)
        leader.resume()
        assert (await first).text == TEXT
        assert (await second).text == "def"
        assert "".join([chunk.text async for chunk in stream]) == TEXT.removeprefix("def")

    def use() -> tuple[str, int]:
        with Client(door.grpc_address, timeout_s=SOON, retry=FAST) as blocking:
            whole = blocking.complete("hi", ALL)
            return whole.text, whole.timing.attempts

    assert await asyncio.to_thread(use) == (TEXT, 1)


async def test_nobody_there_is_told_after_the_last_attempt():
    nowhere = "127.0.0.1:1"
    retry = Retry(attempts=3, backoff_s=0.0)
    async with AsyncClient(nowhere, timeout_s=SOON, retry=retry) as client:
        stream = client.stream("hi")
        with pytest.raises(Unavailable):
            await anext(stream)
        assert stream.timing.attempts == 3
        with pytest.raises(Unavailable):
            await client.models()

    def use() -> int:
        with Client(nowhere, timeout_s=SOON, retry=retry) as blocking:
            stream = blocking.stream("hi")
            with pytest.raises(Unavailable):
                next(stream)
            return stream.timing.attempts

    assert await asyncio.to_thread(use) == 3


def named(count: int) -> Iterator[tuple[str, str, Options]]:
    for index in range(count):
        yield f"r{index}", "hi", Options(max_tokens=50, n=1 + index % 2)


def texts_of(told: list[tuple[str, Chunk | BatonError]]) -> dict[str, str]:
    texts: dict[str, str] = {}
    for name, event in told:
        if isinstance(event, Chunk):
            if event.index == 0:
                texts[name] = texts.get(name, "") + event.text
        else:
            texts[name] = event.code
    return texts


async def test_both_clients_run_more_requests_by_one_call_than_may_be_open(
    client, front_door, monkeypatch
):
    monkeypatch.setattr("baton.api.grpc_batch.MAX_OPEN", 4)
    bad = ("bad", "hi", Options(top_p=5.0))
    wanted = {f"r{index}": TEXT for index in range(12)} | {"bad": "invalid_request"}
    told = [event async for event in client.generate_batch([bad, *named(12)])]
    assert texts_of(told) == wanted

    def use() -> list[tuple[str, Chunk | BatonError]]:
        with Client(front_door.grpc_address, timeout_s=SOON) as blocking:
            return list(blocking.generate_batch([bad, *named(12)]))

    assert texts_of(await asyncio.to_thread(use)) == wanted


async def test_what_the_requests_of_a_batch_raise_is_raised_when_all_is_over(client, front_door):
    def broken() -> Iterator[tuple[str, str, Options]]:
        yield from named(1)
        raise KeyError("no more")

    told = []

    async def take() -> None:
        async for event in client.generate_batch(broken()):
            told.append(event)  # noqa: PERF401 - what came before it raised

    with pytest.raises(KeyError):
        await take()
    assert texts_of(told) == {"r0": TEXT}

    def use() -> None:
        with Client(front_door.grpc_address, timeout_s=SOON) as blocking:
            list(blocking.generate_batch(broken()))

    with pytest.raises(KeyError):
        await asyncio.to_thread(use)


async def test_leaving_a_batch_cancels_what_is_open(client, front_door, leader, text_script):
    leader.script = text_script(TEXT, hold_after=1)
    batch = client.generate_batch(named(3))
    await anext(batch)
    await batch.aclose()
    async with asyncio.timeout(SOON):
        await front_door.gateway.idle()
    leader.script = text_script(TEXT)

    def use() -> str:
        with Client(front_door.grpc_address, timeout_s=SOON) as blocking:
            batch = blocking.generate_batch(named(3))
            next(batch)
            batch.close()
            return blocking.complete("hi", ALL).text

    assert await asyncio.to_thread(use) == TEXT
