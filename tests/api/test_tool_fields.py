"""What a tool choice makes the model write, and when tools are refused."""

import json
from dataclasses import replace

import pytest
from jsonschema import Draft202012Validator

from baton.api.fields import Fields
from baton.api.tool_calls import ToolUse
from baton.api.tool_fields import Tools, read_tools
from baton.api.validate import chat_call
from baton.core.errors import InvalidRequest
from baton.models.chat_template import ChatTemplate

TEMPLATE = ChatTemplate("{{ tools }}{{ messages[0].tool_calls }}", {})
POINT = {
    "type": "object",
    "properties": {"at": {"$ref": "#/$defs/point"}},
    "required": ["at"],
    "$defs": {"point": {"type": "integer"}},
}


def tool(name: str, parameters: object = None) -> dict:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = [tool("f", POINT), tool("g")]


def read(**body: object) -> Tools:
    fields = Fields({"tools": TOOLS} | body)
    found = read_tools(fields, TEMPLATE, "hermes")
    fields.done()
    return found


def schema_of(tools: Tools) -> Draft202012Validator:
    assert tools.grammar is not None
    assert tools.grammar.kind == "json_schema"
    return Draft202012Validator(json.loads(tools.grammar.source))


def test_auto_leaves_the_model_free():
    for body in ({}, {"tool_choice": "auto"}):
        found = read(**body)
        assert found.grammar is None
        assert found.use == ToolUse("hermes", frozenset({"f", "g"}))
        assert found.shown is not None
        assert [row["function"]["name"] for row in found.shown] == ["f", "g"]


def test_none_shows_none():
    assert read(tool_choice="none") == Tools()
    assert read(tools=[]) == read(tools=None) == Tools()


def test_required_allows_calls_of_these_tools_only():
    schema = schema_of(read(tool_choice="required"))
    good = {"name": "f", "parameters": {"at": 5}}
    assert schema.is_valid([good])
    assert schema.is_valid([good, {"name": "g", "parameters": {}}])
    for bad in (
        [],
        good,
        [{"name": "h", "parameters": {}}],
        [{"name": "f", "parameters": {"at": "x"}}],
        [{"name": "f", "parameters": {}}],
        [{"name": "g", "parameters": {"at": 5}}],
        [{"name": "g"}],
    ):
        assert not schema.is_valid(bad), bad
    one = schema_of(read(tool_choice="required", parallel_tool_calls=False))
    assert one.is_valid([good])
    assert not one.is_valid([good, good])


def test_a_named_tool_allows_its_arguments_only():
    found = read(tool_choice={"type": "function", "function": {"name": "f"}})
    assert found.use == ToolUse("named", frozenset({"f", "g"}), named="f")
    assert schema_of(found).is_valid({"at": 5})
    assert not schema_of(found).is_valid({"at": "x"})
    found = read(tool_choice={"type": "function", "function": {"name": "g"}})
    assert not schema_of(found).is_valid({"at": 5})


def test_definitions_of_several_tools_must_agree():
    other = {**POINT, "$defs": {"point": {"type": "string"}}}
    with pytest.raises(InvalidRequest, match="one meaning"):
        read(tools=[tool("f", POINT), tool("g", other)], tool_choice="required")
    same = read(tools=[tool("f", POINT), tool("g", POINT)], tool_choice="required")
    assert schema_of(same).is_valid([{"name": "g", "parameters": {"at": 1}}])


def test_a_template_without_tools_refuses_them():
    for template in (None, ChatTemplate("{{ messages }}", {})):
        with pytest.raises(InvalidRequest, match="no place for tools"):
            read_tools(Fields({"tools": TOOLS}), template, "hermes")


def test_how_the_model_writes_calls_must_be_known_where_it_is_free():
    with pytest.raises(InvalidRequest, match="not known") as refused:
        read_tools(Fields({"tools": TOOLS}), TEMPLATE, None)
    assert refused.value.field == "tool_choice"
    body = {"tools": TOOLS, "tool_choice": "required"}
    assert read_tools(Fields(body), TEMPLATE, None).grammar is not None


def test_the_demo_model_refuses_tools_in_the_history(served_model):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    for message in (
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "x", "tool_call_id": "1"},
    ):
        with pytest.raises(InvalidRequest, match="no place for calls") as refused:
            chat_call({"messages": [message]}, served_model)
        assert refused.value.field.startswith("messages[0].")
    with pytest.raises(InvalidRequest, match="no place for tools"):
        chat_call({"messages": [{"role": "user", "content": "a"}], "tools": TOOLS}, served_model)


def test_special_tokens_are_kept_where_the_tag_is_one(served_model, tool_tokenizer):
    messages = [{"role": "user", "content": "a"}]
    for form, keeps in (("hermes", False), ("mistral", True)):
        model = replace(served_model, tokenizer=tool_tokenizer, tool_format=form)
        call = chat_call({"messages": messages, "tools": TOOLS[1:]}, model)
        assert call.requests[0].skip_special_tokens is not keeps
        assert chat_call({"messages": messages}, model).requests[0].skip_special_tokens
