"""What the OpenAI API's answers look like: one class per endpoint, chunks and whole bodies."""

import time
from dataclasses import dataclass, field
from typing import Protocol

from baton.api.http.logprobs import (
    ChatLogprobs,
    CompletionLogprobs,
    Json,
    LogprobsWriter,
    TokenBytes,
)
from baton.core.request import FinishReason


@dataclass(slots=True)
class Choice:
    """What has been generated for one choice so far."""

    index: int
    prompt_tokens: int
    """0 if another choice of the same prompt counts them."""
    writer: LogprobsWriter
    cached_tokens: int = 0
    """Of `prompt_tokens`, so 0 where these are."""
    text: list[str] = field(default_factory=list)
    logprobs: list[Json] = field(default_factory=list)
    output_tokens: int = 0
    finish: FinishReason | None = None


def usage(choices: list[Choice]) -> Json:
    """Return the usage of all choices together."""
    prompt = sum(choice.prompt_tokens for choice in choices)
    output = sum(choice.output_tokens for choice in choices)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": sum(c.cached_tokens for c in choices)},
    }


class Format(Protocol):
    """How one endpoint's answers look."""

    def writer(self) -> LogprobsWriter:
        """Return what writes the logprobs of one choice."""
        ...

    def opening(self, index: int) -> Json | None:
        """Return the chunk that opens a choice, if there is one."""
        ...

    def delta(self, index: int, text: str, logprobs: Json | None = None) -> Json:
        """Return the chunk that adds text to a choice, and the logprobs of its tokens."""
        ...

    def closing(self, index: int, finish: FinishReason) -> Json:
        """Return the chunk that ends a choice."""
        ...

    def usage_chunk(self, choices: list[Choice]) -> Json:
        """Return the chunk that tells the usage."""
        ...

    def whole(self, choices: list[Choice]) -> Json:
        """Return the body of an answer that is not streamed."""
        ...


class _Base:
    chunk_object = ""
    whole_object = ""

    def __init__(
        self, call_id: str, model: str, token_bytes: TokenBytes, *, include_usage: bool
    ) -> None:
        self._token_bytes = token_bytes
        self._head = {"id": call_id, "created": int(time.time()), "model": model}
        # With include_usage every chunk has a usage, which is null in all but the last.
        self._tail: Json = {"usage": None} if include_usage else {}

    def _chunk(self, choices: list[Json]) -> Json:
        return {**self._head, "object": self.chunk_object, "choices": choices, **self._tail}

    def usage_chunk(self, choices: list[Choice]) -> Json:
        return {**self._chunk([]), "usage": usage(choices)}

    def whole(self, choices: list[Choice]) -> Json:
        rows = [self._whole_choice(choice) for choice in choices]
        return {
            **self._head,
            "object": self.whole_object,
            "choices": rows,
            "usage": usage(choices),
        }

    def _whole_choice(self, choice: Choice) -> Json:
        raise NotImplementedError


class CompletionFormat(_Base):
    """/v1/completions."""

    chunk_object = "text_completion"
    whole_object = "text_completion"

    def writer(self) -> LogprobsWriter:
        return CompletionLogprobs(self._token_bytes)

    def opening(self, index: int) -> Json | None:
        return None

    def delta(self, index: int, text: str, logprobs: Json | None = None) -> Json:
        return self._chunk([_completion_choice(index, text, logprobs, None)])

    def closing(self, index: int, finish: FinishReason) -> Json:
        return self._chunk([_completion_choice(index, "", None, finish)])

    def _whole_choice(self, choice: Choice) -> Json:
        logprobs = choice.writer.joined(choice.logprobs)
        return _completion_choice(choice.index, "".join(choice.text), logprobs, choice.finish)


class ChatFormat(_Base):
    """/v1/chat/completions."""

    chunk_object = "chat.completion.chunk"
    whole_object = "chat.completion"

    def writer(self) -> LogprobsWriter:
        return ChatLogprobs(self._token_bytes)

    def opening(self, index: int) -> Json | None:
        return self._delta(index, {"role": "assistant", "content": ""})

    def delta(self, index: int, text: str, logprobs: Json | None = None) -> Json:
        return self._delta(index, {"content": text}, logprobs)

    def closing(self, index: int, finish: FinishReason) -> Json:
        return self._delta(index, {}, finish=finish)

    def _delta(
        self,
        index: int,
        delta: Json,
        logprobs: Json | None = None,
        finish: FinishReason | None = None,
    ) -> Json:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return self._chunk([choice])

    def _whole_choice(self, choice: Choice) -> Json:
        message = {"role": "assistant", "content": "".join(choice.text), "refusal": None}
        return {
            "index": choice.index,
            "message": message,
            "logprobs": choice.writer.joined(choice.logprobs),
            "finish_reason": choice.finish,
        }


def _completion_choice(
    index: int, text: str, logprobs: Json | None, finish: FinishReason | None
) -> Json:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}
