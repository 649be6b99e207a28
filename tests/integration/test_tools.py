"""Tools and grammars all the way: openai client, gateway, prefill, decode, and back."""

import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest

from baton.api.gateway import Gateway
from baton.api.serve import FrontDoor
from baton.core.config import GatewayConfig
from baton.core.metrics import GatewayMetrics
from baton.core.served_model import FrontModel
from baton.core.topology import Membership, MembershipBoard
from baton.models.tokenizer import load_tokenizer

TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool.function.name }}\n{% endfor %}"
    "{% for m in messages %}{{ m.content }}{{ m.tool_calls }}\n{% endfor %}"
)
POINT = {
    "type": "object",
    "properties": {
        "x": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["corner", "middle"]},
    },
    "required": ["x", "kind"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "draw", "parameters": POINT}},
    {"type": "function", "function": {"name": "clear"}},
]
CHAT: dict[str, Any] = {
    "model": "demo",
    "messages": [{"role": "user", "content": "def draw(point):"}],
    "max_tokens": 200,
    "seed": 7,
}


@pytest.fixture
def model_dir(demo_model_dir: Path, tmp_path: Path) -> Path:
    """The demo model, with a chat template that knows tools."""
    for file in demo_model_dir.iterdir():
        if file.is_file() and file.name != "chat_template.jinja":
            (tmp_path / file.name).symlink_to(file)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    return tmp_path


@pytest.fixture
async def client(
    start_pair: Callable[..., Any], model_dir: Path
) -> AsyncIterator[openai.AsyncOpenAI]:
    """A client of a gateway with one prefill and one decode instance behind it."""
    async with AsyncExitStack() as stack:
        pair = await start_pair(model_dir)
        gateway = Gateway(
            GatewayConfig(http_port=0, grpc_port=0),
            {FrontModel(name="demo", expects_prefill=True): load_tokenizer(model_dir)},
            MembershipBoard(Membership(1, (pair.prefill.info, pair.decode.info))),
            GatewayMetrics(),
        )
        await gateway.start()
        door = await FrontDoor.start(gateway)
        stack.push_async_callback(door.close)
        url = f"{door.http_url}/v1"
        yield await stack.enter_async_context(
            openai.AsyncOpenAI(base_url=url, api_key="-", max_retries=0)
        )


async def test_a_named_tool_gets_arguments_of_its_schema(client: openai.AsyncOpenAI) -> None:
    named: Any = {"type": "function", "function": {"name": "draw"}}
    answer = await client.chat.completions.create(**CHAT, tools=TOOLS, tool_choice=named, n=2)
    for choice in answer.choices:
        [call] = choice.message.tool_calls or []
        assert isinstance(call, openai.types.chat.ChatCompletionMessageFunctionToolCall)
        assert call.function.name == "draw"
        jsonschema.validate(json.loads(call.function.arguments), POINT)


async def test_required_makes_a_call_streamed_as_whole(client: openai.AsyncOpenAI) -> None:
    asked: dict[str, Any] = CHAT | {
        "tools": TOOLS,
        "tool_choice": "required",
        "parallel_tool_calls": False,
    }
    whole = (await client.chat.completions.create(**asked)).choices[0]
    [call] = [c.model_dump()["function"] for c in whole.message.tool_calls or []]
    assert whole.finish_reason == "tool_calls"
    assert call["name"] in ("draw", "clear")
    schema = POINT if call["name"] == "draw" else {"type": "object", "maxProperties": 0}
    jsonschema.validate(json.loads(call["arguments"]), schema)
    async with client.chat.completions.stream(**asked) as stream:
        streamed = (await stream.get_final_completion()).choices[0]
    [again] = [c.model_dump()["function"] for c in streamed.message.tool_calls or []]
    assert (again["name"], again["arguments"]) == (call["name"], call["arguments"])


async def test_every_response_format(client: openai.AsyncOpenAI) -> None:
    async def text(**options: Any) -> str:
        answer = await client.chat.completions.create(**CHAT | options)
        assert answer.choices[0].finish_reason == "stop"
        return answer.choices[0].message.content or ""

    form = {"type": "json_schema", "json_schema": {"name": "point", "schema": POINT}}
    jsonschema.validate(json.loads(await text(response_format=form)), POINT)
    assert await text(extra_body={"guided_choice": ["yes", "no"]}) in ("yes", "no")
    dated = await text(response_format={"type": "regex", "regex": "20[0-9]{2}"})
    assert 2000 <= int(dated) <= 2099
    lark = {"structured_outputs": {"grammar": 'start: "a" "b"~2'}}
    assert await text(extra_body=lark) == "abb"


async def test_a_grammar_that_cannot_be_followed_is_refused(client: openai.AsyncOpenAI) -> None:
    for body, field in (
        ({"response_format": {"type": "regex", "regex": "("}}, "response_format.regex"),
        ({"guided_grammar": "start: nobody"}, "guided_grammar"),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            await client.chat.completions.create(**CHAT, extra_body=body)
        assert refused.value.param == field
