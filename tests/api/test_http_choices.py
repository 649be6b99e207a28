"""n and logprobs by HTTP: framing byte for byte, OpenAI's schema, and OpenAI's own client."""

import json
from dataclasses import replace

import openai
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

TEXT = "def add(a, b):"
CHAT = {"model": "demo", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 50}
COMPLETION = {"model": "demo", "prompt": "hi", "max_tokens": 50}


@pytest.fixture
def numbered(leader, text_script):
    """Answer each request with a text that says which it is, in the order of arrival."""

    def script(request):
        return text_script(f"choice {request.request_id[-1]} speaks")(request)

    leader.script = script


def events_of(response) -> list[dict]:
    frames = response.text.split("\n\n")
    assert frames.pop() == ""
    assert frames.pop() == "data: [DONE]"
    return [json.loads(frame.removeprefix("data: ")) for frame in frames]


@pytest.mark.usefixtures("numbered")
async def test_n_choices_of_one_chat(http, leader, tokenizer):
    body = (await http.post("/v1/chat/completions", json=CHAT | {"n": 3, "seed": 9})).json()
    ChatCompletion.model_validate(body, strict=True)
    rows = [(c["index"], c["message"]["content"]) for c in body["choices"]]
    assert rows == [(i, f"choice {i} speaks") for i in range(3)]
    prompts = [list(submit.request.prompt) for submit in leader.submits]
    assert prompts[0] == prompts[1] == prompts[2]
    assert len({submit.request.seed for submit in leader.submits}) == 3
    assert leader.submits[0].request.seed == 9
    assert body["usage"]["prompt_tokens"] == len(prompts[0]), "a prompt is counted once"
    output = sum(len(tokenizer.encode(f"choice {i} speaks")) for i in range(3))
    assert body["usage"]["completion_tokens"] == output


@pytest.mark.usefixtures("numbered")
async def test_usage_of_several_prompts_with_n(http, tokenizer):
    call = COMPLETION | {"prompt": ["a", "b c d"], "n": 2}
    body = (await http.post("/v1/completions", json=call)).json()
    assert [c["text"] for c in body["choices"]] == [f"choice {i} speaks" for i in range(4)]
    expected = len(tokenizer.encode("a")) + len(tokenizer.encode("b c d"))
    assert body["usage"]["prompt_tokens"] == expected


async def test_cached_tokens_are_counted_once_per_prompt(http, leader, text_script):
    """What the first choice found: later ones find what the first has just computed."""

    def script(request):
        cached = 1 if request.request_id.endswith(("0", "3")) else 4
        return replace(text_script("hi")(request), cached_tokens=cached)

    leader.script = script
    call = COMPLETION | {"prompt": ["a b c d e", "b c d e f"], "n": 3}
    body = (await http.post("/v1/completions", json=call)).json()
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}


@pytest.mark.usefixtures("numbered")
async def test_choices_of_a_stream_come_interleaved_and_each_ends_once(http):
    call = CHAT | {"n": 3, "stream": True, "stream_options": {"include_usage": True}}
    events = events_of(await http.post("/v1/chat/completions", json=call))
    assert events.pop()["choices"] == []
    by_choice: dict[int, list[dict]] = {0: [], 1: [], 2: []}
    for event in events:
        ChatCompletionChunk.model_validate(event, strict=True)
        [choice] = event["choices"]
        by_choice[choice["index"]].append(choice)
    order = [event["choices"][0]["index"] for event in events]
    assert order != sorted(order), "interleaved: nobody waits for the choice before"
    for index, choices in by_choice.items():
        assert choices[0]["delta"] == {"role": "assistant", "content": ""}
        text = "".join(c["delta"].get("content", "") for c in choices)
        assert text == f"choice {index} speaks"
        assert [c["finish_reason"] for c in choices] == [None] * (len(choices) - 1) + ["length"]


async def test_logprobs_of_a_completion(http, tokenizer):
    body = (await http.post("/v1/completions", json=COMPLETION | {"logprobs": 2})).json()
    Completion.model_validate(body, strict=True)
    found = body["choices"][0]["logprobs"]
    ids = tokenizer.encode(TEXT)
    texts = [tokenizer.decode([id_]) for id_ in ids]
    assert found["tokens"] == texts
    assert found["token_logprobs"] == [-0.5] * len(ids)
    rivals = {tokenizer.decode([1000]): 0.0, tokenizer.decode([1001]): -0.25}
    assert found["top_logprobs"] == [{**rivals, text: -0.5} for text in texts]
    offsets = [len("".join(texts[:i])) for i in range(len(texts))]
    assert found["text_offset"] == offsets


async def test_logprobs_of_a_chat(http, tokenizer):
    call = CHAT | {"logprobs": True, "top_logprobs": 1}
    body = (await http.post("/v1/chat/completions", json=call)).json()
    ChatCompletion.model_validate(body, strict=True)
    content = body["choices"][0]["logprobs"]["content"]
    ids = tokenizer.encode(TEXT)
    assert [entry["token"] for entry in content] == [tokenizer.decode([id_]) for id_ in ids]
    rival = tokenizer.decode([1000])
    for entry in content:
        assert bytes(entry["bytes"]).decode() == entry["token"]
        assert entry["logprob"] == -0.5
        assert entry["top_logprobs"] == [
            {"token": rival, "logprob": 0.0, "bytes": list(rival.encode())}
        ]
    plain = (await http.post("/v1/chat/completions", json=CHAT)).json()
    assert plain["choices"][0]["logprobs"] is None


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_streamed_logprobs_add_up_to_those_of_the_whole(http, path):
    call = CHAT | {"logprobs": True} if "chat" in path else COMPLETION | {"logprobs": 1}
    [choice] = (await http.post(path, json=call)).json()["choices"]
    events = events_of(await http.post(path, json=call | {"stream": True}))
    parts = [e["choices"][0]["logprobs"] for e in events if e["choices"][0]["logprobs"]]
    assert len(parts) > 1
    for name, whole in choice["logprobs"].items():
        if isinstance(whole, list):
            assert [entry for part in parts for entry in part[name]] == whole


async def test_parts_of_a_character_and_hidden_stop_strings_have_logprobs_too(
    http, leader, text_script, tokenizer
):
    text = "a\u65e5\U0001f600 stop here"
    leader.script = text_script(text)
    call = COMPLETION | {"logprobs": 0, "stop": [" stop"], "stream": True}
    events = events_of(await http.post("/v1/completions", json=call))
    assert "".join(e["choices"][0]["text"] for e in events) == "a\u65e5\U0001f600"
    parts = [e["choices"][0]["logprobs"] for e in events if e["choices"][0]["logprobs"]]
    tokens = [token for part in parts for token in part["tokens"]]
    offsets = [offset for part in parts for offset in part["text_offset"]]
    assert tokens[0] == "a"
    assert any(token.startswith("bytes:\\x") for token in tokens)
    assert offsets == sorted(offsets)
    assert offsets[-1] == len("a\u65e5\U0001f600")
    chat = CHAT | {"logprobs": True, "stop": [" stop"]}
    [choice] = (await http.post("/v1/chat/completions", json=chat)).json()["choices"]
    data = bytes(byte for entry in choice["logprobs"]["content"] for byte in entry["bytes"])
    assert data.decode().startswith("a\u65e5\U0001f600")


async def test_a_leader_that_forgets_logprobs_is_not_believed(http, leader, text_script):
    leader.script = text_script(TEXT, logprobs=None)
    response = await http.post("/v1/completions", json=COMPLETION | {"logprobs": 1})
    assert response.status_code >= 500
    assert "logprobs" in response.json()["error"]["message"]


@pytest.mark.usefixtures("numbered")
async def test_the_official_client(front_door, leader):
    async with openai.AsyncOpenAI(base_url=f"{front_door.http_url}/v1", api_key="x") as client:
        whole = await client.chat.completions.create(
            **CHAT, n=2, logprobs=True, top_logprobs=2, logit_bias={"7": -100}
        )
        assert [c.message.content for c in whole.choices] == [
            "choice 0 speaks",
            "choice 1 speaks",
        ]
        for choice in whole.choices:
            assert "".join(e.token for e in choice.logprobs.content) == choice.message.content
            assert all(len(e.top_logprobs) == 2 for e in choice.logprobs.content)
        [entry] = leader.submits[0].request.logit_bias
        assert (entry.token, entry.bias) == (7, -100)
        texts, told = ["", ""], [0, 0]
        stream = await client.completions.create(
            **COMPLETION,
            n=2,
            logprobs=3,
            stream=True,
            presence_penalty=0.5,
            frequency_penalty=-0.5,
            extra_body={"repetition_penalty": 1.2, "min_p": 0.1, "bad_words": ["x"]},
        )
        async for chunk in stream:
            [choice] = chunk.choices
            texts[choice.index] += choice.text
            told[choice.index] += len(choice.logprobs.tokens) if choice.logprobs else 0
        assert texts == ["choice 0 speaks", "choice 1 speaks"]
        assert all(told)
        request = leader.submits[-1].request
        assert (request.repetition_penalty, request.min_p) == (1.2, 0.1)
        assert (request.presence_penalty, request.frequency_penalty) == (0.5, -0.5)
        assert len(request.bad_words) >= 1
