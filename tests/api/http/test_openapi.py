"""The description is true: what it says of each field is what validate.py does."""

import asyncio

import pytest

from baton.api.fields import Fields
from baton.api.http.openapi import describe
from baton.api.validate import ServedModel, chat_call, completion_call
from baton.core.errors import InvalidRequest

CHECKS = {
    "Completion": (completion_call, {"prompt": [5], "max_tokens": 255}),
    "Chat": (chat_call, {"messages": [{"role": "user", "content": "a"}]}),
}
NEEDED = {
    "top_logprobs": {"logprobs": True},
    "stream_options": {"stream": True},
    "continue_final_message": {"add_generation_prompt": False},
    "add_generation_prompt": {"continue_final_message": False},
    "tool_choice": {"tools": [{"type": "function", "function": {"name": "f"}}]},
}
"""Rules between fields, which a description by field cannot tell."""
BEYOND = {"best_of": "is that of n", "reasoning_effort": "is the template's", "guided_json": "JSON"}


@pytest.fixture(scope="module")
def tokenizer(tool_tokenizer):
    return tool_tokenizer


@pytest.fixture(scope="module")
def model(tokenizer_with):
    """A model whose chats take up one token, so that the longest answer fits."""
    shortest = tokenizer_with("{% if tools %}{% endif %}{{ messages[0].content }}")
    return ServedModel("demo", shortest, 256, "hermes")


@pytest.mark.parametrize("name", CHECKS)
def test_every_field_that_is_read_is_described_and_no_other(model, monkeypatch, name):
    read: set[str] = set()

    class Recording(dict):
        def pop(self, key, *default):
            read.add(key)
            return super().pop(key, *default)

    begin = Fields.__init__

    def recorded(self, body, *, where=""):
        begin(self, body, where=where)
        if not where:
            self._left = Recording(self._left)

    monkeypatch.setattr(Fields, "__init__", recorded)
    check, body = CHECKS[name]
    check(body, model)
    assert read == describe(model)["components"]["schemas"][name]["properties"].keys()


def good_and_bad(schema: dict) -> tuple[list, list]:
    """Return values at the edges of what a schema allows, and just beyond them."""
    if "anyOf" in schema:
        pairs = [good_and_bad(form) for form in schema["anyOf"]]
        return [value for good, _ in pairs for value in good], []
    if "enum" in schema:
        return schema["enum"], ["no such value", 12345]
    kind = schema.get("type")
    kind = kind[0] if isinstance(kind, list) else kind
    if kind == "boolean":
        return [True, False], ["true", 1, []]
    if kind in ("integer", "number"):
        step = 1 if kind == "integer" else 0.001
        low, high = schema.get("minimum"), schema["maximum"]
        if low is None:
            return [step, high], [schema["exclusiveMinimum"], high + step, "1", True]
        return [low, high], [low - step, high + step, "1", True]
    if kind == "string":
        shortest, longest = schema.get("minLength", 0), schema.get("maxLength")
        good = ["x" * max(shortest, 1), *(["x" * longest] if longest else [])]
        return good, [*([""] if shortest else []), *(["x" * (longest + 1)] if longest else []), 5]
    return [], []


@pytest.mark.parametrize("name", CHECKS)
def test_edges_are_accepted_and_what_is_beyond_is_refused(model, name):
    check, base = CHECKS[name]
    tried = 0
    for field, schema in describe(model)["components"]["schemas"][name]["properties"].items():
        if field in base or field in BEYOND:
            continue
        good, bad = good_and_bad(schema)
        needed = base | NEEDED.get(field, {})
        for value in [*good, None]:
            if field == "continue_final_message" and value is None:
                continue
            check(needed | {field: value}, model)
            tried += 1
        for value in bad:
            with pytest.raises(InvalidRequest) as refused:
                check(needed | {field: value}, model)
            assert refused.value.field.startswith(field), (field, value)
            tried += 1
    assert tried > 100


async def test_it_is_served_and_pages_that_load_scripts_are_not(http, gateway):
    told = (await http.get("/openapi.json")).json()
    assert told["paths"].keys() >= {"/v1/completions", "/v1/chat/completions", "/tokenize"}
    for path in ("/docs", "/redoc"):
        assert (await http.get(path)).status_code == 404


@pytest.mark.parametrize(
    "path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"]
)
async def test_whatever_schemathesis_sends_is_answered_as_described(http, front_door, path):
    """Bodies that the description allows, and mutations that it does not."""
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, given, settings

    url = front_door.http_url
    described = (await http.get("/openapi.json")).json()
    schema = schemathesis.openapi.from_dict(described)

    def run(mode: object) -> list[tuple[int, str]]:
        statuses: list[tuple[int, str]] = []
        operation = schema[path]["POST"]

        @settings(
            max_examples=10,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def try_one(case) -> None:
            response = case.call(base_url=url, timeout=120)
            statuses.append((response.status_code, response.text))
            assert response.status_code in (200, 400, 404, 415, 429), response.text
            if response.status_code != 200:
                error = response.json()["error"]
                assert set(error) == {"message", "type", "param", "code"}

        try_one()
        return statuses

    good = await asyncio.to_thread(run, schemathesis.GenerationMode.POSITIVE)
    assert len(good) > 5
    assert 200 in [status for status, _ in good]
    bad = await asyncio.to_thread(run, schemathesis.GenerationMode.NEGATIVE)
    assert len(bad) > 5
    accepted = [text for status, text in bad if status == 200]
    assert not accepted, accepted[0]
