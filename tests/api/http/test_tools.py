"""Tools, over HTTP and by OpenAI's own client: what the model sees, and what its calls become."""

import json

import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "get_weather", "description": "Look out.", "parameters": PARAMETERS},
    },
    {"type": "function", "function": {"name": "now"}},
]
CHAT = {
    "model": "demo",
    "messages": [{"role": "user", "content": "hi"}],
    "max_tokens": 100,
    "tools": TOOLS,
}
ARGUMENTS = '{"city": "K\u00f6ln \U0001f600"}'
CALLS = (
    f'Let me see.\n<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now"}\n</tool_call>'
)


@pytest.fixture(scope="module")
def tokenizer(tool_tokenizer):
    return tool_tokenizer


@pytest.fixture
def says(leader, text_script):
    """Let the model say a text, and stop."""

    def say(text: str, finish: str = "stop") -> None:
        leader.script = text_script(text, finish=finish)

    return say


def prompt_of(leader, tokenizer, at: int = -1) -> str:
    return tokenizer.decode(list(leader.submits[at].request.prompt))


async def test_calls_of_a_whole_answer(http, leader, tokenizer, says):
    says(CALLS)
    body = (await http.post("/v1/chat/completions", json=CHAT)).json()
    ChatCompletion.model_validate(body, strict=True)
    [choice] = body["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Let me see."
    calls = choice["message"]["tool_calls"]
    rows = [(c["type"], c["function"]["name"], c["function"]["arguments"]) for c in calls]
    assert rows == [("function", "get_weather", ARGUMENTS), ("function", "now", "{}")]
    assert len({call["id"] for call in calls}) == 2
    assert all(call["id"].startswith("call_") for call in calls)
    assert '"get_weather", "description": "Look out."' in prompt_of(leader, tokenizer)


async def test_a_stream_says_the_same_as_the_whole(http, says):
    says(CALLS)
    response = await http.post("/v1/chat/completions", json=CHAT | {"stream": True})
    frames = response.text.split("\n\n")
    assert frames[-2:] == ["data: [DONE]", ""]
    events = [json.loads(frame.removeprefix("data: ")) for frame in frames[:-2]]
    text, calls = "", []
    for event in events:
        ChatCompletionChunk.model_validate(event, strict=True)
        delta = event["choices"][0]["delta"]
        text += delta.get("content", "")
        for call in delta.get("tool_calls", []):
            if call["index"] == len(calls):
                assert call["type"] == "function"
                assert call["function"]["arguments"] == ""
                calls.append([call["id"], call["function"]["name"], ""])
            else:
                assert call.keys() == {"index", "function"}
                calls[call["index"]][2] += call["function"]["arguments"]
    assert text == "Let me see."
    assert [call[1:] for call in calls] == [["get_weather", ARGUMENTS], ["now", "{}"]]
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"


async def test_parallel_tool_calls_off_leaves_one(http, says):
    says(CALLS)
    call = CHAT | {"parallel_tool_calls": False}
    body = (await http.post("/v1/chat/completions", json=call)).json()
    assert len(body["choices"][0]["message"]["tool_calls"]) == 1


async def test_an_answer_without_a_call_is_a_text(http, says):
    says("a <tool_call> is a tag")
    [choice] = (await http.post("/v1/chat/completions", json=CHAT)).json()["choices"]
    message = {"role": "assistant", "content": "a <tool_call> is a tag", "refusal": None}
    assert (choice["message"], choice["finish_reason"]) == (message, "stop")


async def test_no_tool_is_shown_and_none_is_found_where_none_may_be_called(
    http, leader, tokenizer, says
):
    says(CALLS)
    call = CHAT | {"tool_choice": "none"}
    [choice] = (await http.post("/v1/chat/completions", json=call)).json()["choices"]
    assert choice["message"]["content"] == CALLS
    assert "get_weather" not in prompt_of(leader, tokenizer)


async def test_required_is_a_list_of_calls(http, says):
    says(f'[{{"name": "now", "parameters": {{}}}}, {{"name": "x", "parameters": {ARGUMENTS}}}]')
    call = CHAT | {"tool_choice": "required"}
    [choice] = (await http.post("/v1/chat/completions", json=call)).json()["choices"]
    assert choice["message"]["content"] is None
    calls = [call["function"] for call in choice["message"]["tool_calls"]]
    assert calls == [{"name": "now", "arguments": "{}"}, {"name": "x", "arguments": ARGUMENTS}]
    assert choice["finish_reason"] == "tool_calls"


async def test_a_named_tool_gets_all_of_the_text(http, says):
    says(ARGUMENTS)
    choice = {"type": "function", "function": {"name": "get_weather"}}
    body = (await http.post("/v1/chat/completions", json=CHAT | {"tool_choice": choice})).json()
    [choice] = body["choices"]
    [call] = choice["message"]["tool_calls"]
    assert call["function"] == {"name": "get_weather", "arguments": ARGUMENTS}
    assert choice["finish_reason"] == "stop"


async def test_an_answer_that_is_cut_off_says_so(http, says):
    says('<tool_call>{"name": "now", "arguments": {"a": 1', finish="length")
    [choice] = (await http.post("/v1/chat/completions", json=CHAT)).json()["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"a": 1'


async def test_each_of_n_choices_has_its_own_calls(http, says):
    says(CALLS)
    body = (await http.post("/v1/chat/completions", json=CHAT | {"n": 2})).json()
    ids = [call["id"] for choice in body["choices"] for call in choice["message"]["tool_calls"]]
    assert len(set(ids)) == 4


async def test_logprobs_of_all_tokens_are_told_with_calls_too(http, says, tokenizer):
    says(CALLS)
    call = CHAT | {"logprobs": True, "stream": True}
    response = await http.post("/v1/chat/completions", json=call)
    frames = response.text.split("\n\n")[:-2]
    rows = [json.loads(frame.removeprefix("data: "))["choices"][0] for frame in frames]
    told = [entry for row in rows if row["logprobs"] for entry in row["logprobs"]["content"]]
    assert len(told) == len(tokenizer.encode(CALLS))


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools[1].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tool_choice": "any"}, "tool_choice"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "nobody"}}},
            "tool_choice.function.name",
        ),
        ({"tools": None, "tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "[]"}}],
                    }
                ]
            },
            "messages[0].tool_calls[0].function.arguments",
        ),
    ],
)
async def test_what_is_refused(http, leader, change, param):
    response = await http.post("/v1/chat/completions", json=CHAT | change)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert not leader.submits


async def test_the_official_client_goes_all_the_way_round(front_door, leader, tokenizer, says):
    """Question, streamed call, result, answer: the loop of every agent."""
    says(CALLS)
    async with openai.AsyncOpenAI(base_url=f"{front_door.http_url}/v1", api_key="x") as client:
        messages = list(CHAT["messages"])
        async with client.chat.completions.stream(**CHAT) as stream:
            answer = (await stream.get_final_completion()).choices[0]
        assert answer.finish_reason == "tool_calls"
        assert answer.message.tool_calls[0].function.arguments == ARGUMENTS
        messages.append(answer.message.model_dump(exclude_none=True))
        messages += [
            {"role": "tool", "tool_call_id": call.id, "content": "rain"}
            for call in answer.message.tool_calls
        ]
        says("It rains.")
        last = await client.chat.completions.create(
            **CHAT | {"messages": messages, "max_tokens": 40}
        )
    assert last.choices[0].message.content == "It rains."
    prompt = prompt_of(leader, tokenizer)
    assert "<assistant>Let me see." in prompt
    assert json.dumps(ARGUMENTS) not in prompt, "templates get an object, and not a string"
    assert '"arguments": ' + ARGUMENTS in prompt
    assert prompt.count("<tool>rain") == 2
