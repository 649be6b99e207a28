"""Tool calls are found in text that comes in any pieces; what is told does not depend on them."""

import itertools
import json
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.api.tool_calls import Arguments, CallBegins, Text, ToolUse, format_of, make_parser

FORMS = ("hermes", "llama3_json", "mistral", "named", "required")
NAMES = frozenset({"f", "get_weather"})


@dataclass
class Told:
    text: str = ""
    calls: list[list[str]] = field(default_factory=list)


def told(form: str, pieces, *, one: bool = False) -> Told:
    parser = make_parser(ToolUse(form, NAMES, named="f", one=one))  # type: ignore[arg-type]
    found = Told()
    for event in [e for piece in pieces for e in parser.push(piece)] + parser.finish():
        match event:
            case Text(text):
                assert text
                found.text += text
            case CallBegins(index, name):
                assert index == len(found.calls)
                found.calls.append([name, ""])
            case Arguments(index, text):
                assert text
                assert index == len(found.calls) - 1
                found.calls[index][1] += text
    assert parser.calls == len(found.calls)
    return found


def call(name: str = "f", **arguments: object) -> str:
    return json.dumps({"name": name, "arguments": arguments})


A, B = '{"a": 1}', '{"city": "K\\u00f6ln }\\" [", "n": [1, {"x": null}]}'
CASES = [
    ("hermes", f'hi\n<tool_call>\n{{"name": "f", "arguments": {A}}}\n</tool_call>', "hi", [A]),
    (
        "hermes",
        f'<tool_call>{{"arguments": {B}, "name": "f"}}</tool_call>\n<tool_call>\n'
        f'{{"name": "f", "id": [1, "}}"], "arguments": {A}}}\n</tool_call>\n',
        "",
        [B, A],
    ),
    ("hermes", '<tool_call>{"name": "f"}</tool_call> and so on', " and so on", ["{}"]),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}', "", [A]),
    ("hermes", '<tool_call>{"name": "f", "arguments": null}', "", ["{}"]),
    ("hermes", f'<tool_call>{{"name": "f", "arguments": {A}}}</tool_c', "", [A]),
    ("hermes", "a < b <tool_call", "a < b <tool_call", []),
    ("hermes", "x <tool_call> is a tag", "x <tool_call> is a tag", []),
    ("hermes", '<tool_call>{"name": 5}</tool_call>', '<tool_call>{"name": 5}</tool_call>', []),
    ("hermes", f'<tool_call><tool_call>{{"name": "f", "arguments": {A}}}', "<tool_call>", [A]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": [1,', "", ['{"a": [1,']),
    ("hermes", '<tool_call>{"name": "f', '<tool_call>{"name": "f', []),
    ("hermes", "just {text}\n", "just {text}\n", []),
    ("hermes", '<tool_call>{"name": "\\ud800"}', '<tool_call>{"name": "\\ud800"}', []),
    ("hermes", '<tool_call>{"name": "f", "arguments": "\\ud800"}', "", ["{}"]),
    ("mistral", f'[TOOL_CALLS] [{{"name": "f", "arguments": {A}}}]', "", [A]),
    (
        "mistral",
        f'so: [TOOL_CALLS][{{"name": "f", "arguments": {A}}}, {{"name": "f", "arguments": {B}}}]',
        "so:",
        [A, B],
    ),
    ("mistral", f"[TOOL_CALLS]f{B}[TOOL_CALLS]f[ARGS]{A}", "", [B, A]),
    ("mistral", "[TOOL_CALLS] no name {}", "[TOOL_CALLS] no name {}", []),
    ("mistral", "[TOOL_CALLS]f\n{}", "[TOOL_CALLS]f\n{}", []),
    ("mistral", "[TOOL_CALLS][1]", "[TOOL_CALLS][1]", []),
    ("llama3_json", f'{{"name": "f", "parameters": {A}}}', "", [A]),
    (
        "llama3_json",
        f'<|python_tag|>{{"type": "function", "name": "f", "parameters": {B}}}',
        "",
        [B],
    ),
    (
        "llama3_json",
        f'\n{{"name": "f", "parameters": {A}}}; {{"name": "f", "parameters": {B}}}',
        "",
        [A, B],
    ),
    (
        "llama3_json",
        '{"name": "other", "parameters": {}}',
        '{"name": "other", "parameters": {}}',
        [],
    ),
    ("llama3_json", '{"answer": 42}', '{"answer": 42}', []),
    ("llama3_json", " a {1} b", " a {1} b", []),
    (
        "required",
        f'[{{"name": "f", "parameters": {A}}},\n{{"name":"f","parameters":{B}}}]',
        "",
        [A, B],
    ),
    ("required", "none of it", "none of it", []),
    ("named", B, "", [B]),
    ("named", "", "", []),
]


@pytest.mark.parametrize(("form", "text", "shown", "arguments"), CASES)
def test_what_is_found_does_not_depend_on_where_it_is_cut(form, text, shown, arguments):
    expected = Told(shown, [["f", given] for given in arguments])
    assert told(form, [text]) == expected
    assert told(form, text) == expected, "one character at a time"
    for a in range(len(text)):
        for b in (a + 1, len(text)):
            assert told(form, [text[:a], text[a:b], text[b:]]) == expected, (text[:a], text[a:b])


fragments = st.sampled_from(
    [
        *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", ";", ", "),
        *('{"name": "f", "arguments": {"a": "\\"}"}}', '{"name": "f", "parameters": ', '"name"'),
        *("{", "}", "[", "]", '"', "\\", ":", ",", " ", "\n", "f", "get_weather", "7", "null"),
    ]
)


@settings(deadline=None, max_examples=150)
@given(
    st.sampled_from(FORMS),
    st.lists(fragments | st.text(max_size=3), max_size=12).map("".join),
    st.lists(st.integers(0, 300), max_size=8),
)
def test_any_text_in_any_pieces(form, text, cuts):
    whole = told(form, [text])
    bounds = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(bounds)]
    assert told(form, pieces) == whole == told(form, text)
    if not whole.calls:
        assert whole.text == text, "what holds no call is shown as it is"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.dictionaries(st.text(max_size=5), json_values, max_size=3), min_size=1, max_size=3),
    st.booleans(),
    st.lists(st.integers(0, 500), max_size=6),
)
def test_calls_that_are_written_as_they_should_be_come_back(arguments, ascii_only, cuts):
    calls = [{"name": "f", "arguments": given} for given in arguments]
    rows = [json.dumps(row, ensure_ascii=ascii_only) for row in calls]
    texts = {
        "hermes": "".join(f"<tool_call>\n{row}\n</tool_call>\n" for row in rows),
        "mistral": f"[TOOL_CALLS][{', '.join(rows)}]",
        "llama3_json": "; ".join(rows),
        "required": f"[{','.join(rows)}]",
    }
    for form, text in texts.items():
        bounds = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
        found = told(form, [text[a:b] for a, b in itertools.pairwise(bounds)])
        assert found.text == ""
        assert [name for name, _ in found.calls] == ["f"] * len(calls)
        assert [json.loads(given) for _, given in found.calls] == arguments
        assert told(form, [text], one=True).calls == found.calls[:1]


def test_arguments_are_told_while_they_come():
    parser = make_parser(ToolUse("hermes"))
    assert parser.push('ok <tool_call>{"name": "get_weather", "argu') == [
        Text("ok"),
        CallBegins(0, "get_weather"),
    ]
    assert parser.push('ments": {"city": "Par') == [Arguments(0, '{"city": "Par')]
    assert parser.push('is"}}</tool_call>') == [Arguments(0, 'is"}')]
    assert parser.finish() == []


@pytest.mark.parametrize(
    ("template", "form"),
    [
        ("{% if tools %}<tool_call>\n{% endif %}", "hermes"),
        ("{{ '[TOOL_CALLS] [' }}", "mistral"),
        ("{{ '<|python_tag|>' }}", "llama3_json"),
        ("<tool_call><function=name>", None),
        ("{{ messages }}", None),
    ],
)
def test_the_format_is_told_by_the_template(template, form):
    assert format_of(template) == form
