"""What the OpenAI API's answers look like: one class per endpoint, chunks and whole bodies."""

import secrets
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from baton.api.http.logprobs import (
    ChatLogprobs,
    CompletionLogprobs,
    Json,
    LogprobsWriter,
    TokenBytes,
)
from baton.api.text_stream import Piece
from baton.api.tool_calls import (
    Arguments,
    CallBegins,
    Event,
    Text,
    ToolParser,
    ToolUse,
    make_parser,
)
from baton.core.request import FinishReason


@dataclass(slots=True)
class ToolCall:
    """One call that an answer makes."""

    call_id: str
    name: str
    arguments: list[str] = field(default_factory=list)

    def as_json(self) -> Json:
        """Return the call as a whole message has it."""
        function = {"name": self.name, "arguments": "".join(self.arguments)}
        return {"id": self.call_id, "type": "function", "function": function}


@dataclass(slots=True)
class Choice:
    """What has been generated for one choice so far."""

    index: int
    prompt_tokens: int
    """0 if another choice of the same prompt counts them."""
    writer: LogprobsWriter
    echo: str = ""
    """Stands before the text."""
    tools: ToolUse | None = None
    cached_tokens: int = 0
    """Of `prompt_tokens`, so 0 where these are."""
    text: list[str] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    logprobs: list[Json] = field(default_factory=list)
    output_tokens: int = 0
    finish: FinishReason | None = None
    _parser: ToolParser | None = None

    def __post_init__(self) -> None:
        self._parser = None if self.tools is None else make_parser(self.tools)

    def read(self, piece: Piece) -> list[Event]:
        """Take a piece; return what became certain of text and calls."""
        self.finish = piece.finish
        if self._parser is None:
            return [Text(piece.text)] if piece.text else []
        events = self._parser.push(piece.text)
        if piece.finish is not None:
            events += self._parser.finish()
        for event in events:
            if isinstance(event, CallBegins):
                self.calls.append(ToolCall(self._call_id(), event.name))
        return events

    def keep(self, events: list[Event]) -> None:
        """Keep what `read` returned, for an answer that is sent as a whole."""
        for event in events:
            match event:
                case Text(text):
                    self.text.append(text)
                case Arguments(index, text):
                    self.calls[index].arguments.append(text)

    @property
    def finish_reason(self) -> str | None:
        """The reason, as OpenAI says it: with a named tool, there is nothing else to stop for."""
        named = self.tools is not None and self.tools.form == "named"
        if self.calls and self.finish is FinishReason.STOP and not named:
            return "tool_calls"
        return self.finish

    def _call_id(self) -> str:
        if self.tools is not None and self.tools.form == "mistral":
            return secrets.token_hex(5)[:9]  # What its chat templates insist on.
        return f"call_{secrets.token_hex(12)}"


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

    def opening(self, choice: Choice) -> Json | None:
        """Return the chunk that opens a choice, if there is one."""
        ...

    def delta(self, choice: Choice, event: Event, logprobs: Json | None = None) -> Json:
        """Return the chunk that adds to a choice what `event` says, and logprobs of its tokens."""
        ...

    def closing(self, choice: Choice) -> Json:
        """Return the chunk that ends a choice."""
        ...

    def usage_chunk(self, choices: list[Choice]) -> Json:
        """Return the chunk that tells the usage."""
        ...

    def whole(self, choices: list[Choice]) -> Json:
        """Return the body of an answer that is not streamed."""
        ...


class _Base(ABC):
    chunk_object: ClassVar[str]
    whole_object: ClassVar[str]

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

    @abstractmethod
    def _whole_choice(self, choice: Choice) -> Json:
        """Return a choice of an answer that is not streamed."""


class CompletionFormat(_Base):
    """/v1/completions."""

    chunk_object = "text_completion"
    whole_object = "text_completion"

    def writer(self) -> LogprobsWriter:
        return CompletionLogprobs(self._token_bytes)

    def opening(self, choice: Choice) -> Json | None:
        return self.delta(choice, Text(choice.echo)) if choice.echo else None

    def delta(self, choice: Choice, event: Event, logprobs: Json | None = None) -> Json:
        assert isinstance(event, Text), "completions have no tools"
        return self._chunk([_completion_choice(choice.index, event.text, logprobs, None)])

    def closing(self, choice: Choice) -> Json:
        return self._chunk([_completion_choice(choice.index, "", None, choice.finish_reason)])

    def _whole_choice(self, choice: Choice) -> Json:
        text = "".join([choice.echo, *choice.text])
        logprobs = choice.writer.joined(choice.logprobs)
        return _completion_choice(choice.index, text, logprobs, choice.finish_reason)


class ChatFormat(_Base):
    """/v1/chat/completions."""

    chunk_object = "chat.completion.chunk"
    whole_object = "chat.completion"

    def writer(self) -> LogprobsWriter:
        return ChatLogprobs(self._token_bytes)

    def opening(self, choice: Choice) -> Json | None:
        return self._delta(choice, {"role": "assistant", "content": ""})

    def delta(self, choice: Choice, event: Event, logprobs: Json | None = None) -> Json:
        return self._delta(choice, _chat_delta(choice, event), logprobs)

    def closing(self, choice: Choice) -> Json:
        return self._delta(choice, {}, finish=choice.finish_reason)

    def _delta(
        self,
        choice: Choice,
        delta: Json,
        logprobs: Json | None = None,
        finish: str | None = None,
    ) -> Json:
        row = {
            "index": choice.index,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": finish,
        }
        return self._chunk([row])

    def _whole_choice(self, choice: Choice) -> Json:
        text = "".join(choice.text)
        content = None if choice.calls and not text else text
        message: Json = {"role": "assistant", "content": content, "refusal": None}
        if choice.calls:
            message["tool_calls"] = [call.as_json() for call in choice.calls]
        return {
            "index": choice.index,
            "message": message,
            "logprobs": choice.writer.joined(choice.logprobs),
            "finish_reason": choice.finish_reason,
        }


def _chat_delta(choice: Choice, event: Event) -> Json:
    match event:
        case Text(text):
            return {"content": text}
        case CallBegins(index, name):
            call = {"index": index, "id": choice.calls[index].call_id, "type": "function"}
            return {"tool_calls": [{**call, "function": {"name": name, "arguments": ""}}]}
        case Arguments(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}


def _completion_choice(index: int, text: str, logprobs: Json | None, finish: str | None) -> Json:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}
