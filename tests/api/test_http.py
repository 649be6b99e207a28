import asyncio
import json
from dataclasses import replace

import httpx
import openai
import pytest
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from baton.core.ids import InstanceId
from baton.core.topology import Membership, Role

TEXT = "def add(a, b):"
CHAT = {"model": "demo", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 50}
COMPLETION = {"model": "demo", "prompt": "hi", "max_tokens": 50}
SOON = 10  # a deadline for events that are expected at once


def events_of(response: httpx.Response) -> list[dict]:
    """Check the framing byte by byte, and return the events before `[DONE]`."""
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/event-stream"
    frames = response.text.split("\n\n")
    assert frames.pop() == "", "the last event ends with an empty line too"
    assert frames.pop() == "data: [DONE]"
    assert all(frame.startswith("data: ") and "\n" not in frame for frame in frames)
    return [json.loads(frame.removeprefix("data: ")) for frame in frames]


def check_schema(kind: type, body: dict) -> None:
    """Check `body` against the published schema, of which the openai package's types are made."""
    kind.model_validate(body, strict=True)
    assert set(body) <= set(kind.model_fields), "no field that OpenAI does not have"


async def test_whole_chat(http):
    response = await http.post("/v1/chat/completions", json=CHAT)
    body = response.json()
    check_schema(ChatCompletion, body)
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": TEXT, "refusal": None}
    assert choice["finish_reason"] == "length"
    assert body["id"].startswith("chatcmpl-")
    assert response.headers["x-request-id"] == body["id"]


async def test_whole_completion_and_usage(http, tokenizer):
    body = (await http.post("/v1/completions", json=COMPLETION)).json()
    check_schema(Completion, body)
    assert body["choices"][0]["text"] == TEXT
    prompt, output = len(tokenizer.encode("hi")), len(tokenizer.encode(TEXT))
    assert body["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


async def test_several_prompts_are_several_choices(http, leader, text_script, tokenizer):
    texts = {tuple(tokenizer.encode(p)): f"answer to {p}" for p in ("a", "b", "c")}
    leader.script = lambda request: text_script(texts[tuple(request.prompt)])(request)
    call = COMPLETION | {"prompt": ["a", "b", "c"]}
    body = (await http.post("/v1/completions", json=call)).json()
    rows = [(choice["index"], choice["text"]) for choice in body["choices"]]
    assert rows == [(0, "answer to a"), (1, "answer to b"), (2, "answer to c")]
    events = events_of(await http.post("/v1/completions", json=call | {"stream": True}))
    streamed = {0: "", 1: "", 2: ""}
    for event in events:
        streamed[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert streamed == {0: "answer to a", 1: "answer to b", 2: "answer to c"}
    assert [e["choices"][0]["finish_reason"] for e in events].count("length") == 3


async def test_framing_of_a_streamed_chat(http):
    events = events_of(await http.post("/v1/chat/completions", json=CHAT | {"stream": True}))
    for event in events:
        check_schema(ChatCompletionChunk, event)
        assert len(event["choices"]) == 1
        assert "usage" not in event
    assert len({(event["id"], event["created"], event["model"]) for event in events}) == 1
    deltas = [event["choices"][0]["delta"] for event in events]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert deltas[-1] == {}
    assert all(set(delta) == {"content"} and delta["content"] for delta in deltas[1:-1])
    assert "".join(delta["content"] for delta in deltas[1:-1]) == TEXT
    reasons = [event["choices"][0]["finish_reason"] for event in events]
    assert reasons == [None] * (len(events) - 1) + ["length"]


async def test_framing_of_a_streamed_completion(http):
    events = events_of(await http.post("/v1/completions", json=COMPLETION | {"stream": True}))
    assert "".join(event["choices"][0]["text"] for event in events) == TEXT
    assert [e["choices"][0]["finish_reason"] for e in events][-1] == "length"
    assert {event["object"] for event in events} == {"text_completion"}
    for event in events[-1:]:
        check_schema(Completion, event)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_usage_comes_last_and_is_null_before(http, tokenizer, path):
    call = (CHAT if "chat" in path else COMPLETION) | {
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    events = events_of(await http.post(path, json=call))
    assert all(event["usage"] is None for event in events[:-1])
    assert events[-1]["choices"] == []
    usage = events[-1]["usage"]
    assert usage["completion_tokens"] == len(tokenizer.encode(TEXT))
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


async def test_a_stop_string_is_not_shown_and_the_reason_is_stop(http):
    call = COMPLETION | {"stop": ["(a"], "stream": True}
    events = events_of(await http.post("/v1/completions", json=call))
    assert "".join(event["choices"][0]["text"] for event in events) == "def add"
    assert events[-1]["choices"][0]["finish_reason"] == "stop"


def check_error(response: httpx.Response, status: int, code: str, param: str | None) -> str:
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param)
    assert error["type"] == ("server_error" if status >= 500 else error["type"])
    return error["message"]


@pytest.mark.parametrize(
    ("path", "change", "status", "code", "param"),
    [
        ("completions", {"seed": 2**64}, 400, "invalid_request", "seed"),
        ("completions", {"stop": [{}]}, 400, "invalid_request", "stop[0]"),
        ("completions", {"prompt": {"a": 1}}, 400, "invalid_request", "prompt"),
        ("completions", {"prompt": ""}, 400, "invalid_request", "prompt"),
        ("completions", {"model": "other"}, 404, "model_not_found", "model"),
        ("completions", {"max_tokens": 10**6}, 400, "invalid_request", "max_tokens"),
        ("chat/completions", {"messages": []}, 400, "invalid_request", "messages"),
        ("chat/completions", {"tools": [{}]}, 400, "invalid_request", "tools[0].type"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_bad_input(http, leader, path, change, status, code, param, stream):
    base = CHAT if "chat" in path else COMPLETION
    response = await http.post(f"/v1/{path}", json=base | change | {"stream": stream})
    assert param in check_error(response, status, code, param)
    assert not leader.submits


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"\xff\xfe",
        b'{"prompt": NaN}',
        b"[" * 100_000,
        b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "\\ud800": 1}',
    ],
    ids=range(10),
)
async def test_a_body_that_is_not_a_json_object(http, content):
    headers = {"content-type": "application/json"}
    response = await http.post("/v1/completions", content=content, headers=headers)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["type"] == "invalid_request_error"


async def test_errors_of_http_itself_have_the_same_shape(http):
    check_error(await http.get("/v1/nothing"), 404, "not_found", None)
    check_error(await http.get("/v1/completions"), 405, "method_not_allowed", None)
    wrong = await http.post("/v1/completions", content=b"{}", headers={"content-type": "text/xml"})
    check_error(wrong, 415, "unsupported_media_type", None)
    headers = {"content-type": "application/json"}
    big = await http.post("/v1/completions", content=b" " * (5 << 20), headers=headers)
    check_error(big, 413, "request_too_large", None)

    async def endless():
        for _ in range(80):
            yield b" " * (1 << 16)

    chunked = await http.post("/v1/completions", content=endless(), headers=headers)
    check_error(chunked, 413, "request_too_large", None)
    check_error(await http.get("/v1/models/other"), 404, "model_not_found", "model")
    check_error(await http.get("/v1/requests/other"), 404, "not_found", None)


@pytest.mark.parametrize("stream", [False, True])
async def test_too_many_is_429_with_retry_after(
    make_front_door, leader, text_script, until, stream
):
    leader.script = text_script("one two three", hold_after=1)
    door = await make_front_door(max_open_requests=1, max_queued_requests=0)
    async with httpx.AsyncClient(base_url=door.http_url, timeout=20) as client:
        first = asyncio.create_task(client.post("/v1/completions", json=COMPLETION))
        await until(lambda: leader.running == 1)
        refused = await client.post("/v1/completions", json=COMPLETION | {"stream": stream})
        check_error(refused, 429, "overloaded", None)
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.headers["x-refusal-reason"] == "queue_full"
        leader.resume()
        assert (await first).json()["choices"][0]["text"] == "one two three"


async def test_a_deadline_is_a_field_or_a_header_and_the_earlier_one_holds(
    make_front_door, leader, text_script
):
    leader.script = text_script("one two three", hold_after=1)
    door = await make_front_door()
    calls = [({"timeout": 0.05}, {}), ({"timeout": 60}, {"x-request-timeout-ms": "50"})]
    async with httpx.AsyncClient(base_url=door.http_url, timeout=20) as client:
        for more, headers in calls:
            late = await client.post("/v1/completions", json=COMPLETION | more, headers=headers)
            check_error(late, 504, "deadline_exceeded", None)
        for header in ("0", "1.5", "-1", "soon", "9" * 20):
            headers = {"x-request-timeout-ms": header}
            bad = await client.post("/v1/completions", json=COMPLETION, headers=headers)
            check_error(bad, 400, "invalid_request", "x-request-timeout-ms")
        for value in (0, -1, "1", 1e9):
            bad = await client.post("/v1/completions", json=COMPLETION | {"timeout": value})
            check_error(bad, 400, "invalid_request", "timeout")


async def test_an_error_in_mid_stream_is_an_event_and_then_the_end(
    make_front_door, leader, text_script
):
    leader.script = text_script("one two three", hold_after=2)
    call = COMPLETION | {"stream": True}
    door = await make_front_door(max_migrations=0)
    async with (
        httpx.AsyncClient(base_url=door.http_url, timeout=20) as http,
        http.stream("POST", "/v1/completions", json=call) as response,
    ):
        lines = response.aiter_lines()
        first = await anext(lines)
        assert json.loads(first.removeprefix("data: "))["choices"][0]["text"]
        await leader.close()
        rest = [line async for line in lines if line]
    error = json.loads(rest[-1].removeprefix("data: "))["error"]
    assert error["code"] == "instance_lost"
    assert error["type"] == "server_error"
    assert "data: [DONE]" not in rest


async def raw_request(front_door, body: dict) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = front_door.http_url.removeprefix("http://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    data = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    await writer.drain()
    return reader, writer


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("hold_after", [0, 2])
async def test_a_client_that_goes_away_cancels(
    front_door, leader, text_script, until, stream, hold_after
):
    leader.script = text_script("one two three", hold_after=hold_after)
    reader, writer = await raw_request(front_door, COMPLETION | {"stream": stream})
    await until(lambda: leader.running == 1)
    if stream and hold_after:
        await reader.readuntil(b"data: ")
    writer.transport.abort()
    async with asyncio.timeout(SOON):
        await leader.cancelled.get()
        await front_door.gateway.idle()
    assert front_door.gateway.stats().models["demo"].router.open_requests == 0
    assert leader.running == 0
    assert b'outcome="cancelled"} 1.0' in front_door.gateway.metrics.render()


async def test_all_prompts_of_a_client_that_goes_away_are_cancelled(
    front_door, leader, text_script, until
):
    leader.script = text_script("one two three", hold_after=1)
    call = COMPLETION | {"prompt": ["a", "b", "c"], "stream": True}
    _, writer = await raw_request(front_door, call)
    await until(lambda: leader.running == 3)
    writer.close()
    async with asyncio.timeout(SOON):
        assert {await leader.cancelled.get() for _ in range(3)} == {1, 2, 3}
        await front_door.gateway.idle()


async def test_one_refused_prompt_refuses_all_and_cancels_the_rest(
    make_front_door, leader, text_script
):
    leader.script = text_script("one two three", hold_after=1)
    door = await make_front_door(max_open_requests=2, max_queued_requests=0)
    async with httpx.AsyncClient(base_url=door.http_url, timeout=20) as client:
        call = COMPLETION | {"prompt": ["a", "b", "c"]}
        check_error(await client.post("/v1/completions", json=call), 429, "overloaded", None)
    async with asyncio.timeout(SOON):
        await door.gateway.idle()


async def test_a_client_that_goes_away_while_it_sends(front_door, until):
    host, _, port = front_door.http_url.removeprefix("http://").rpartition(":")
    _, writer = await asyncio.open_connection(host, int(port))
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: 1000\r\n\r\n{{".encode())
    await writer.drain()
    writer.close()
    metrics = front_door.gateway.metrics
    await until(lambda: b'outcome="cancelled"} 1.0' in metrics.render())


async def test_models(http):
    body = (await http.get("/v1/models")).json()
    assert body["object"] == "list"
    (row,) = body["data"]
    Model.model_validate(row, strict=True)
    assert row["id"] == row["root"] == "demo"
    assert row["max_model_len"] == 256
    assert (await http.get("/v1/models/demo")).json() == row


async def test_health(make_front_door, board, leader):
    door = await make_front_door(expects_prefill=True)
    async with httpx.AsyncClient(base_url=door.http_url) as client:
        response = await client.get("/health")
        assert response.status_code == 503
        assert response.json()["reasons"] == ["no prefill instance is ready"]
        prefill = replace(leader.info(Role.PREFILL), instance_id=InstanceId("prefill-0"))
        board.publish(Membership(2, (*board.current.instances, prefill)))
        response = await client.get("/health")
        assert (response.status_code, response.json()["reasons"]) == (200, [])


async def test_metrics_and_trace(http):
    body = (await http.post("/v1/completions", json=COMPLETION)).json()
    await http.post("/v1/completions", json={})
    metrics = await http.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain")
    assert 'baton_requests_total{model="demo",outcome="length"} 1.0' in metrics.text
    assert 'baton_requests_total{model="demo",outcome="invalid_request"} 1.0' in metrics.text
    assert '\nbaton_ttft_seconds_count{model="demo"} 1.0\n' in metrics.text
    trace = (await http.get(f"/v1/requests/{body['id']}")).json()
    assert trace["request_id"] == body["id"]
    assert trace["decode_instance"] == "decode-0"
    assert trace["output_tokens"] == body["usage"]["completion_tokens"]


async def test_the_official_async_client(front_door, tokenizer):
    async with openai.AsyncOpenAI(base_url=f"{front_door.http_url}/v1", api_key="x") as client:
        assert [model.id async for model in client.models.list()] == ["demo"]
        whole = await client.chat.completions.create(**CHAT)
        assert whole.choices[0].message.content == TEXT
        stream = await client.chat.completions.create(
            **CHAT, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == TEXT
        assert chunks[-1].usage.completion_tokens == len(tokenizer.encode(TEXT))
        stream = await client.completions.create(**COMPLETION, stream=True)
        assert "".join([chunk.choices[0].text async for chunk in stream]) == TEXT
        with pytest.raises(openai.BadRequestError) as bad:
            await client.completions.create(**(COMPLETION | {"prompt": ""}))
        assert bad.value.param == "prompt"
        with pytest.raises(openai.NotFoundError):
            await client.completions.create(**(COMPLETION | {"model": "other"}))


async def test_the_official_sync_client(front_door):
    def use() -> tuple[str, str, str, str]:
        with openai.OpenAI(base_url=f"{front_door.http_url}/v1", api_key="x") as client:
            chat = client.chat.completions.create(**CHAT)
            streamed = client.chat.completions.create(**CHAT, stream=True)
            text = "".join(c.choices[0].delta.content or "" for c in streamed)
            whole = client.completions.create(**COMPLETION)
            pieces = client.completions.create(**COMPLETION, stream=True)
            return (
                chat.choices[0].message.content,
                text,
                whole.choices[0].text,
                "".join(piece.choices[0].text for piece in pieces),
            )

    assert await asyncio.to_thread(use) == (TEXT, TEXT, TEXT, TEXT)


async def test_the_official_client_that_closes_a_stream_cancels(front_door, leader, text_script):
    leader.script = text_script("one two three", hold_after=1)
    async with openai.AsyncOpenAI(base_url=f"{front_door.http_url}/v1", api_key="x") as client:
        stream = await client.completions.create(**COMPLETION, stream=True)
        assert (await anext(aiter(stream))).choices[0].text
        await stream.close()
        async with asyncio.timeout(SOON):
            await leader.cancelled.get()
            await front_door.gateway.idle()


@pytest.mark.parametrize(
    ("fields", "headers", "session"),
    [
        ({}, {}, ""),
        ({"user": "u"}, {}, "u"),
        ({"user": "u", "prompt_cache_key": "k"}, {}, "k"),
        ({"user": "u", "session": "s"}, {}, "s"),
        ({"user": 7, "session": "\ud800"}, {}, "\ud800"),
        ({"session": "s"}, {"x-session": "h"}, "h"),
    ],
)
async def test_the_session_of_a_request(http, front_door, monkeypatch, fields, headers, session):
    hints, router = [], front_door.gateway.models.by_name("demo")._router
    plan = router.plan

    def heard(membership, *, hint, **numbers):
        hints.append(hint)
        return plan(membership, hint=hint, **numbers)

    monkeypatch.setattr(router, "plan", heard)
    body = json.dumps({"prompt": "one", "max_tokens": 4, **fields})
    kind = {"content-type": "application/json"}
    answer = await http.post("/v1/completions", content=body, headers=headers | kind)
    assert answer.status_code == 200, answer.text
    assert [hint.session for hint in hints] == [session]
    await front_door.gateway.idle()
    told = await http.get(f"/v1/requests/{hints[0].request_id}/explain")
    assert told.json()["measured"]["finish"] in ("length", "stop")
    missing = await http.get("/v1/requests/nobody/explain")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
