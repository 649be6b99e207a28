"""What OpenAI's own client for Python offers beyond plain calls, and vLLM's fields through it."""

import json
from typing import Literal

import openai
import pytest
from pydantic import BaseModel

MESSAGES = [{"role": "user", "content": "hi"}]


class Point(BaseModel):
    """A class as users write it."""

    x: int
    kind: Literal["corner", "middle"]


@pytest.fixture
async def client(front_door):
    base = f"{front_door.http_url}/v1"
    async with openai.AsyncOpenAI(base_url=base, api_key="x", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def tokenizer(tool_tokenizer):
    return tool_tokenizer


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # the client's own
async def test_parsed_answers(client, leader, text_script):
    leader.script = text_script('{"x": 5, "kind": "corner"}', finish="stop")
    answer = await client.chat.completions.parse(
        model="demo", messages=MESSAGES, response_format=Point
    )
    assert answer.choices[0].message.parsed == Point(x=5, kind="corner")
    grammar = leader.submits[-1].request.grammar
    assert grammar.kind == "json_schema"
    assert json.loads(grammar.source)["properties"].keys() == {"x", "kind"}
    messages = [*MESSAGES, answer.choices[0].message, *MESSAGES]
    again = await client.chat.completions.create(model="demo", messages=messages)
    assert again.choices[0].finish_reason == "stop", "an answer may be sent back as it came"


async def test_tools_that_are_classes(client, leader, text_script):
    text = '<tool_call>{"name": "Point", "arguments": {"x": 5, "kind": "middle"}}</tool_call>'
    leader.script = text_script(text, finish="stop")
    answer = await client.chat.completions.parse(
        model="demo", messages=MESSAGES, tools=[openai.pydantic_function_tool(Point)]
    )
    message = answer.choices[0].message
    assert message.tool_calls[0].function.parsed_arguments == Point(x=5, kind="middle")
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "done"}
    messages = [*MESSAGES, message, result]
    await client.chat.completions.create(model="demo", messages=messages, max_tokens=50)
    assert not leader.submits[-1].request.HasField("grammar")


async def test_fields_of_vllm_go_into_the_extra_body(client, leader, tokenizer):
    await client.chat.completions.create(
        model="demo",
        messages=[*MESSAGES, {"role": "assistant", "content": "I am"}],
        extra_body={
            "top_k": 5,
            "min_p": 0.1,
            "repetition_penalty": 1.1,
            "min_tokens": 2,
            "stop_token_ids": [7],
            "ignore_eos": True,
            "bad_words": ["no"],
            "guided_choice": ["a", "b"],
            "chat_template_kwargs": {"style": "brief"},
            "add_generation_prompt": False,
            "continue_final_message": False,
        },
    )
    request = leader.submits[-1].request
    assert (request.top_k, request.min_tokens) == (5, 2)
    assert list(request.stop_token_ids) == [7]
    assert (request.grammar.kind, request.grammar.source) == ("choice", '["a", "b"]')
    prompt = tokenizer.decode(list(request.prompt))
    assert prompt == "<user>hi<assistant>I amstyle brief\n"


async def test_a_message_is_continued(client, leader, tokenizer):
    extra = {"continue_final_message": True}
    messages = [*MESSAGES, {"role": "assistant", "content": "I am"}]
    await client.chat.completions.create(model="demo", messages=messages, extra_body=extra)
    assert tokenizer.decode(list(leader.submits[-1].request.prompt)) == "<user>hi<assistant>I am"


async def test_ids_usage_and_reasons(client, leader, text_script):
    leader.script = text_script("hi", finish="stop", cached_tokens=3)
    raw = await client.chat.completions.with_raw_response.create(
        model="demo", messages=MESSAGES, extra_headers={"X-Request-Id": "mine"}
    )
    assert raw.request_id == "mine"
    answer = raw.parse()
    assert answer.usage.prompt_tokens_details.cached_tokens == 3
    assert answer.choices[0].finish_reason == "stop"
    model = await client.models.retrieve("demo")
    assert model.model_extra["max_model_len"] == 256


@pytest.mark.parametrize(
    ("body", "kind", "param"),
    [
        ({"store": True}, openai.BadRequestError, "store"),
        ({"logit_bias": {"x": 1}}, openai.BadRequestError, "logit_bias"),
        ({"verbosity": "low"}, openai.BadRequestError, "verbosity"),
        ({"reasoning_effort": "low"}, openai.BadRequestError, "reasoning_effort"),
        ({"no_such_field": 1}, openai.BadRequestError, "no_such_field"),
        ({"model": "other"}, openai.NotFoundError, "model"),
    ],
)
async def test_errors_have_the_clients_own_classes(client, body, kind, param):
    with pytest.raises(kind) as refused:
        await client.chat.completions.create(model="demo", messages=MESSAGES, extra_body=body)
    assert refused.value.param == param
    assert refused.value.code
