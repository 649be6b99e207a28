"""What the output must match, in every way that users may say it."""

import json

import pytest

from baton.api.fields import Fields
from baton.api.grammar_fields import MAX_SCHEMA_DEPTH, read_grammar
from baton.api.validate import chat_call, completion_call
from baton.core.errors import InvalidRequest
from baton.core.grammar import MAX_GRAMMAR_BYTES, Grammar

SCHEMA = {"type": "object", "properties": {"a": {"$ref": "#/$defs/n"}}, "$defs": {"n": {}}}
SOURCE = json.dumps(SCHEMA, separators=(",", ":"))


def schema_format(**changes):
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA} | changes}


@pytest.mark.parametrize(
    ("body", "grammar"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Grammar("json_object", "")),
        ({"response_format": schema_format()}, Grammar("json_schema", SOURCE)),
        ({"response_format": schema_format(strict=False)}, Grammar("json_schema", SOURCE)),
        ({"response_format": {"type": "regex", "regex": "a+"}}, Grammar("regex", "a+")),
        (
            {"response_format": {"type": "grammar", "grammar": "start: X"}},
            Grammar("lark", "start: X"),
        ),
        ({"structured_outputs": {"json": SCHEMA}}, Grammar("json_schema", SOURCE)),
        ({"structured_outputs": {"json_object": True}}, Grammar("json_object", "")),
        ({"structured_outputs": {"json_object": False}}, None),
        ({"structured_outputs": {"choice": ["a", "\u00e9"]}}, Grammar("choice", '["a", "\u00e9"]')),
        ({"guided_json": json.dumps(SCHEMA)}, Grammar("json_schema", SOURCE)),
        ({"guided_regex": "[0-9]"}, Grammar("regex", "[0-9]")),
        ({"guided_grammar": "start: A"}, Grammar("lark", "start: A")),
        ({"guided_choice": ["x"]}, Grammar("choice", '["x"]')),
    ],
)
def test_every_way_to_say_it(served_model, body, grammar):
    for check, base in (
        (completion_call, {"prompt": "a", "n": 2}),
        (chat_call, {"messages": [{"role": "user", "content": "a"}], "n": 2}),
    ):
        call = check(base | body, served_model)
        assert [r.generate.sampling.grammar for r in call.requests] == [grammar] * 2


DEEP: dict = {}
for _ in range(MAX_SCHEMA_DEPTH):
    DEEP = {"not": DEEP}


@pytest.mark.parametrize(
    ("field", "body"),
    [
        ("response_format", {"response_format": "json"}),
        ("response_format.type", {"response_format": {}}),
        ("response_format.type", {"response_format": {"type": "xml"}}),
        ("response_format.json_schema", {"response_format": {"type": "json_schema"}}),
        ("response_format.json_schema.schema", {"response_format": schema_format(schema=None)}),
        ("response_format.json_schema.schema", {"response_format": schema_format(schema=[])}),
        (
            "response_format.json_schema.schema",
            {"response_format": schema_format(schema={"type": "strin"})},
        ),
        (
            "response_format.json_schema.schema: $ref",
            {"response_format": schema_format(schema={"$ref": "http://127.0.0.1/x"})},
        ),
        ("response_format.json_schema.schema", {"response_format": schema_format(schema=DEEP)}),
        (
            "response_format.json_schema.schema",
            {"response_format": schema_format(schema={"const": "x" * MAX_GRAMMAR_BYTES})},
        ),
        (
            "response_format.json_schema.schema",
            {"response_format": schema_format(schema={"const": "\ud800"})},
        ),
        ("response_format.json_schema.extra", {"response_format": schema_format(extra=1)}),
        ("response_format.regex", {"response_format": {"type": "regex"}}),
        ("guided_json", {"guided_json": "{"}),
        ("guided_json", {"guided_json": 5}),
        ("guided_regex", {"guided_regex": ""}),
        ("guided_choice", {"guided_choice": []}),
        ("guided_choice[1]", {"guided_choice": ["a", ""]}),
        ("guided_json_object", {"guided_json_object": "yes"}),
        ("structured_outputs.structural_tag", {"structured_outputs": {"structural_tag": "{}"}}),
        ("guided_regex", {"response_format": {"type": "json_object"}, "guided_regex": "a"}),
        ("structured_outputs.regex", {"structured_outputs": {"json": SCHEMA, "regex": "a"}}),
    ],
)
def test_what_is_refused(field, body):
    with pytest.raises(InvalidRequest) as refused:
        read_grammar(Fields(body))
    assert refused.value.field == field
    assert refused.value.allowed
