"""Bytes that nobody expects, in both directions: an error in OpenAI's shape, or the text itself."""

import asyncio
import json

import httpx
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

BOUNDED = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
CHAT = {"model": "demo", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 9}
PATHS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")
VALID = [
    json.dumps(CHAT | {"stream": True, "stream_options": {"include_usage": True}}).encode(),
    json.dumps({"prompt": ["a", "b"], "n": 2, "logprobs": 2, "stop": ["x"]}).encode(),
    b'{"prompt": [1, 2], "logit_bias": {"7": -1}, "guided_json": {"type": "object"}}',
    b'{"tokens": [1, 2]}',
]
damages = st.lists(
    st.tuples(
        st.integers(0, 200),
        st.sampled_from(
            [b"", b"{", b"}", b'"', b"\\", b"\\ud800", b"\xff", b"\0", b"1e999", b"[["]
        ),
    ),
    max_size=4,
)


def damaged(body: bytes, changes: list[tuple[int, bytes]]) -> bytes:
    for at, what in changes:
        at %= len(body) + 1
        body = body[:at] + what + body[at + 1 :]
    return body


async def test_any_body_is_answered(front_door):
    def run() -> None:
        with httpx.Client(base_url=front_door.http_url, timeout=120) as http:

            @BOUNDED
            @given(
                st.sampled_from(PATHS),
                st.builds(damaged, st.sampled_from(VALID), damages) | st.binary(max_size=40),
                st.sampled_from(["application/json", "application/json; charset=x", "", "a/b"]),
            )
            def try_one(path: str, body: bytes, kind: str) -> None:
                response = http.post(path, content=body, headers={"content-type": kind})
                assert response.status_code in (200, 400, 404, 415), response.text
                if response.status_code != 200:
                    assert set(response.json()["error"]) == {"message", "type", "param", "code"}

            try_one()

    await asyncio.to_thread(run)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_any_text_comes_through_the_framing_as_it_is(
    front_door, leader, text_script, tokenizer, path
):
    """By the EventSource standard: events end with an empty line, whatever is inside."""
    call = ({"prompt": "a"} if path == "/v1/completions" else CHAT) | {
        "max_tokens": 200,
        "stream": True,
    }

    def run() -> None:
        with httpx.Client(base_url=front_door.http_url, timeout=120) as http:

            @BOUNDED
            @given(st.text(min_size=1, max_size=40))
            @example("a\n\nb\r\n\r\ndata: [DONE]\n\n")
            @example("\u2028\u2029\x85\x1c\0\ufeff")
            @example("\U0001f468\u200d\U0001f469\u200d\U0001f467\u65e5")
            def try_one(text: str) -> None:
                leader.script = text_script(text)
                shown = ""
                response = http.post(path, json=call)
                *frames, done, end = response.content.split(b"\n\n")
                assert (done, end) == (b"data: [DONE]", b"")
                for frame in frames:
                    assert frame.startswith(b"data: ")
                    assert b"\n" not in frame
                    assert b"\r" not in frame
                    choice = json.loads(frame[6:])["choices"][0]
                    piece = choice["text"] if "text" in choice else choice["delta"].get("content")
                    shown += piece or ""
                    assert "\ufffd" not in (piece or "") or "\ufffd" in text, "half a character"
                assert shown == tokenizer.decode(tokenizer.encode(text)[:200])

            try_one()

    await asyncio.to_thread(run)
