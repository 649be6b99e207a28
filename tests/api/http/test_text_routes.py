"""Echo, special tokens, /tokenize, /detokenize, /version, and X-Request-Id."""

import json

import httpx
import openai
import pytest
from openai.types import Completion

from baton import __version__

COMPLETION = {"model": "demo", "prompt": "hi", "max_tokens": 50}
FACE = "\U0001f600"


def texts_of(response: httpx.Response) -> list[str]:
    assert response.status_code == 200, response.text
    frames = response.text.split("\n\n")
    assert frames[-2:] == ["data: [DONE]", ""]
    events = [json.loads(frame.removeprefix("data: ")) for frame in frames[:-2]]
    return [event["choices"][0]["text"] for event in events]


@pytest.mark.parametrize("prompt", ["x = \u00e9", [300, 301, 302]])
async def test_echo_puts_the_prompt_before_the_output(http, tokenizer, prompt):
    call = COMPLETION | {"prompt": prompt, "echo": True}
    shown = prompt if isinstance(prompt, str) else tokenizer.decode(prompt)
    body = (await http.post("/v1/completions", json=call)).json()
    Completion.model_validate(body, strict=True)
    assert body["choices"][0]["text"] == f"{shown}def add(a, b):"
    assert body["usage"]["completion_tokens"] == len(tokenizer.encode("def add(a, b):"))
    streamed = texts_of(await http.post("/v1/completions", json=call | {"stream": True}))
    assert streamed[0] == shown
    assert "".join(streamed) == body["choices"][0]["text"]


async def test_echo_of_several_prompts_with_stop_strings_that_only_the_prompt_has(http):
    call = COMPLETION | {"prompt": ["one", "two"], "n": 2, "echo": True, "stop": ["o"]}
    body = (await http.post("/v1/completions", json=call)).json()
    texts = [choice["text"] for choice in body["choices"]]
    assert texts == ["onedef add(a, b):"] * 2 + ["twodef add(a, b):"] * 2


@pytest.mark.parametrize("stream", [False, True])
async def test_a_character_that_the_prompt_began_is_echoed_whole(
    http, leader, text_script, tokenizer, stream
):
    ids = tokenizer.encode(FACE)
    assert len(ids) > 1
    script = text_script(FACE)

    def go_on(request):
        answer = script(request)
        answer.tokens = [*ids[1:], *tokenizer.encode(" ok")]
        return answer

    leader.script = go_on
    prompt = [*tokenizer.encode("a"), ids[0]]
    call = COMPLETION | {"prompt": prompt, "echo": True, "stream": stream}
    response = await http.post("/v1/completions", json=call)
    text = "".join(texts_of(response)) if stream else response.json()["choices"][0]["text"]
    assert text == f"a{FACE} ok"


async def test_echo_with_logprobs_is_refused(http):
    response = await http.post("/v1/completions", json=COMPLETION | {"echo": True, "logprobs": 1})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "echo"
    assert "not computed" in response.json()["error"]["message"]


async def test_special_tokens_are_shown_where_asked_for(http, leader, text_script):
    leader.script = text_script("a<|endoftext|>b")
    call = COMPLETION | {"ignore_eos": True}
    for skip, text in ((True, "ab"), (False, "a<|endoftext|>b")):
        body = (
            await http.post("/v1/completions", json=call | {"skip_special_tokens": skip})
        ).json()
        assert body["choices"][0]["text"] == text


async def test_tokenize_and_back(http, tokenizer):
    text = f"def f(): # {FACE}"
    body = (await http.post("/tokenize", json={"model": "demo", "prompt": text})).json()
    ids = tokenizer.encode(text)
    assert body == {"count": len(ids), "max_model_len": 256, "tokens": ids, "token_strs": None}
    back = (await http.post("/detokenize", json={"tokens": ids})).json()
    assert back == {"prompt": text}
    call = {"prompt": "a b", "return_token_strs": True}
    assert (await http.post("/tokenize", json=call)).json()["token_strs"] == ["a", " b"]
    assert (await http.post("/detokenize", json={"tokens": [0]})).json()["prompt"] != ""


async def test_tokenize_a_chat_gives_the_prompt_that_would_be_sent(http, leader):
    chat = {"messages": [{"role": "user", "content": "hi"}], "add_generation_prompt": True}
    tokens = (await http.post("/tokenize", json=chat)).json()["tokens"]
    await http.post("/v1/chat/completions", json=chat)
    assert list(leader.submits[-1].request.prompt) == tokens


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": 5}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "x": 1}, 400, "x"),
        ("/tokenize", {"prompt": "a", "model": "b"}, 404, "model"),
        ("/tokenize", {"messages": [], "prompt": "a"}, 400, "messages"),
        (
            "/tokenize",
            {"messages": [{"role": "user", "content": "a"}], "prompt": "a"},
            400,
            "prompt",
        ),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens[0]"),
        ("/detokenize", {"tokens": "a"}, 400, "tokens"),
        ("/detokenize", {}, 400, "tokens"),
    ],
)
async def test_what_they_refuse(http, path, body, status, param):
    response = await http.post(path, json=body)
    assert response.status_code == status
    assert response.json()["error"]["param"] == param


async def test_version(http):
    assert (await http.get("/version")).json() == {"version": __version__}


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_id_comes_back(http, stream):
    call = COMPLETION | {"stream": stream}
    named = await http.post("/v1/completions", json=call, headers={"X-Request-Id": "mine/1"})
    assert named.headers.get_list("x-request-id") == ["mine/1"]
    unnamed = await http.post("/v1/completions", json=call)
    assert unnamed.headers["x-request-id"].startswith("cmpl-")


async def test_a_request_id_comes_back_with_an_error_and_a_bad_one_does_not(http):
    headers = {"X-Request-Id": "mine"}
    response = await http.post("/v1/completions", json={}, headers=headers)
    assert (response.status_code, response.headers["x-request-id"]) == (400, "mine")
    assert (await http.get("/v1/nothing", headers=headers)).headers["x-request-id"] == "mine"
    for bad in ("x" * 129, "two words", ""):
        response = await http.post(
            "/v1/completions", json=COMPLETION, headers={"X-Request-Id": bad}
        )
        assert response.headers["x-request-id"].startswith("cmpl-")


async def test_the_official_client_echoes(front_door):
    async with openai.AsyncOpenAI(base_url=f"{front_door.http_url}/v1", api_key="x") as client:
        whole = await client.completions.create(**COMPLETION, echo=True)
        assert whole.choices[0].text == "hidef add(a, b):"
        with pytest.raises(openai.BadRequestError, match="best_of"):
            await client.completions.create(**COMPLETION, best_of=3)
        with pytest.raises(openai.BadRequestError, match="suffix"):
            await client.completions.create(**COMPLETION, suffix="x")
