import json

import pytest

from baton.client.http_wire import Answer, chat_body, error_from, headers_of
from baton.client.options import Message, Options
from baton.core.errors import (
    Cancelled,
    InternalError,
    Overloaded,
    Unauthenticated,
    Unavailable,
)

CHAT = [Message("user", "hi")]


def line(**event: object) -> str:
    return "data: " + json.dumps({"id": "c-1", **event})


def row(text: str = "", finish: str | None = None, index: int = 0) -> dict[str, object]:
    return {"index": index, "delta": {"content": text}, "finish_reason": finish}


def test_what_is_not_chosen_is_left_to_the_server_and_zero_is_a_choice():
    body = chat_body(CHAT, Options())
    assert body.keys() == {"messages", "stream", "stream_options"}
    body = chat_body(CHAT, Options(temperature=0.0, seed=0, priority=-1, logit_bias={7: 0.5}))
    assert (body["temperature"], body["seed"], body["priority"]) == (0.0, 0, -1)
    assert body["logit_bias"] == {"7": 0.5}
    assert headers_of(Options(timing=True), 1.5) == {
        "x-request-timeout-ms": "1500",
        "x-baton-timing": "1",
    }
    assert headers_of(Options(), 0.0) == {"x-request-timeout-ms": "1"}
    assert headers_of(Options(), 1e9) == {"x-request-timeout-ms": "86400000"}


def test_the_last_chunk_of_each_choice_has_the_usage():
    answer = Answer()
    assert [c.text for c in answer.read(line(choices=[row("a")]))] == ["a"]
    assert answer.read(": keep-alive") == answer.read("") == []
    assert answer.read(line(choices=[row("!", "stop", index=1)], usage=None)) == []
    assert answer.read(line(choices=[row("", "length")], usage=None)) == []
    with pytest.raises(Unavailable, match="broke off"):
        answer.check_complete()
    usage = {"prompt_tokens": 3, "completion_tokens": 5}
    ended = answer.read(line(choices=[], usage=usage))
    assert [(c.index, c.text, c.finish_reason) for c in ended] == [
        (0, "", "length"),
        (1, "!", "stop"),
    ]
    assert [(c.prompt_tokens, c.completion_tokens) for c in ended] == [(3, 0), (3, 5)]
    assert answer.read("data: [DONE]") == []
    answer.check_complete()


@pytest.mark.parametrize(
    ("status", "text", "kind"),
    [
        (401, '{"error": {"code": "invalid_api_key", "message": "no"}}', Unauthenticated),
        (200, '{"error": {"code": "cancelled", "message": "no"}}', Cancelled),
        (503, "<html>", Unavailable),
        (503, '{"error": {"code": "of_tomorrow", "message": "no"}}', Unavailable),
        (429, "", Overloaded),
        (413, '{"error": {"code": "request_too_large", "message": "no"}}', InternalError),
        (500, "[]", InternalError),
    ],
)
def test_each_error_is_told_by_its_code_or_else_by_its_status(status, text, kind):
    assert type(error_from(status, {}, text)) is kind


def test_when_to_come_back_is_in_the_headers():
    found = error_from(429, {"retry-after": "7", "x-refusal-reason": "ttft"}, "")
    assert isinstance(found, Overloaded)
    assert (found.retry_after_s, found.reason) == (7.0, "ttft")
    unclear = error_from(429, {"retry-after": "Fri, 31 Dec 2027"}, "")
    assert isinstance(unclear, Overloaded)
    assert unclear.retry_after_s == 1.0
