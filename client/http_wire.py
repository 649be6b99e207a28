"""What the HTTP client sends and hears; pure: text in, chunks and errors out."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from baton.client.answer import Chunk, ServerTiming
from baton.client.options import Message, Options, checked_chat
from baton.core.errors import BatonError, InvalidRequest, Overloaded, Unavailable
from baton.proto.errors import error_of

Json = dict[str, Any]

TIMING = "x-baton-timing"
DEADLINE = "x-request-timeout-ms"
_LONGEST_S = 86_400.0
"""That the gateway takes for a deadline."""
_ELSEWHERE = frozenset({"logprobs", "logit_bias", "priority", "timing"})
"""Options that are not said as the others are."""
_BY_STATUS = {429: "overloaded", 502: "unavailable", 503: "unavailable", 504: "unavailable"}
"""The code of an error that tells none, such as a proxy's."""


def chat_body(messages: Sequence[Message], options: Options) -> Json:
    """Return the body that asks for a chat to be answered; raises InvalidRequest."""
    if options.logprobs is not None:
        raise InvalidRequest("logprobs", options.logprobs, "none over HTTP; gRPC has them")
    body: Json = {
        "messages": [
            {"role": said.role, "content": said.content} for said in checked_chat(messages)
        ],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if options.priority:
        body["priority"] = options.priority  # 0 leaves it to the tenant's default
    if options.logit_bias:
        body["logit_bias"] = {str(token): bias for token, bias in options.logit_bias.items()}
    for name in (option.name for option in fields(options) if option.name not in _ELSEWHERE):
        value = getattr(options, name)
        if not (value is None or value is False or value == "" or value == ()):
            body[name] = list(value) if isinstance(value, tuple) else value
    return body


def headers_of(options: Options, left_s: float) -> dict[str, str]:
    """Return the headers of one attempt that may take `left_s` seconds."""
    left_ms = max(1, int(1000 * min(left_s, _LONGEST_S)))
    told = {TIMING: "1"} if options.timing else {}
    return {DEADLINE: str(left_ms), **told}


def error_from(status: int, headers: Mapping[str, str], text: str) -> BatonError:
    """Return what an answer with an error status means."""
    try:
        told = json.loads(text)["error"]
        code, message = str(told["code"]), str(told["message"])
    except (ValueError, KeyError, TypeError):
        code, message = "", text[:200] or "no more than that"
    found = error_of(code, message) if code else None
    if found is None or (found.code == "internal" and code != "internal"):
        found = error_of(_BY_STATUS.get(status, "internal"), f"HTTP {status}: {message}")
    if isinstance(found, Overloaded):
        after = headers.get("retry-after", "")
        found.retry_after_s = float(after) if after.isdecimal() else found.retry_after_s
        found.reason = headers.get("x-refusal-reason", found.reason)
    return found


class Answer:
    """Reads one answer's server-sent events line by line.

    HTTP tells usage once and of all choices together, so the last chunk of each choice waits for
    it; what was generated is counted in the last of these.
    """

    def __init__(self) -> None:
        self._last: dict[int, Chunk] = {}
        self.done = False
        """All of it is there."""

    def __repr__(self) -> str:
        return f"Answer(ended={sorted(self._last)}, done={self.done})"

    def read(self, line: str) -> list[Chunk]:
        """Return the chunks that a line brings; raises the error that it tells of."""
        if not line.startswith("data:"):
            return []  # a comment that keeps the connection alive, or the end of an event
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            self.done = True
            return []
        event = json.loads(data)
        if "error" in event:
            raise error_from(200, {}, data)
        if event.get("usage") is not None:
            return self._ends(event)
        return [chunk for row in event["choices"] for chunk in self._chunks(event["id"], row)]

    def check_complete(self) -> None:
        """Raise Unavailable if the connection ended before the answer did."""
        if not self.done:
            raise Unavailable("the answer broke off")

    def _chunks(self, call_id: str, row: Json) -> list[Chunk]:
        chunk = Chunk(
            request_id=call_id,
            text=row["delta"].get("content") or "",
            token_ids=(),
            finish_reason=row.get("finish_reason") or "",
            prompt_tokens=0,
            completion_tokens=0,
            cached_prompt_tokens=0,
            index=row["index"],
        )
        if chunk.finish_reason:
            self._last[chunk.index] = chunk
            return []
        return [chunk] if chunk.text else []

    def _ends(self, event: Json) -> list[Chunk]:
        usage = event["usage"]
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        timings = {row["index"]: row for row in event.get("baton", {}).get("timing", ())}
        ended = [self._last[index] for index in sorted(self._last)]
        self._last.clear()
        return [
            replace(
                chunk,
                prompt_tokens=usage["prompt_tokens"],
                completion_tokens=usage["completion_tokens"] if chunk is ended[-1] else 0,
                cached_prompt_tokens=cached,
                timing=_timing(timings.get(chunk.index)),
            )
            for chunk in ended
        ]


def _timing(row: Json | None) -> ServerTiming | None:
    if row is None:
        return None
    spans = {name: ms / 1000 for name, ms in row["spans_ms"].items()}
    return ServerTiming(row["ttft_ms"] / 1000, spans)
