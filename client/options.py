"""What to generate from, and how."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

from baton.core.errors import InvalidRequest
from baton.proto import inference_pb2 as pb


@dataclass(frozen=True, slots=True)
class Message:
    """What one side of a chat said."""

    role: str
    """`system`, `developer`, `user` or `assistant`."""
    content: str


Prompt = str | Sequence[int] | Sequence[Message]
"""A text, token ids, or a chat to be answered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to generate; None leaves the choice to the server (see proto/inference.proto)."""

    model: str = ""
    """Empty: the only model that is served."""
    max_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    bad_words: tuple[str, ...] = ()
    min_tokens: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    n: int | None = None
    logprobs: int | None = None
    priority: int = 0
    timing: bool = False
    """Let the server tell where the time to the first token went: see Chunk.timing."""


def checked_chat(messages: Sequence[Message]) -> Sequence[Message]:
    """Return what was said in a chat; raises InvalidRequest if that is nothing."""
    if not messages:
        raise InvalidRequest("messages", [], "at least one message")
    return messages


def request_of(prompt: Prompt, options: Options) -> pb.GenerateRequest:
    """Return the message to send; raises InvalidRequest for what no message can hold."""
    given = {option.name: getattr(options, option.name) for option in fields(options)}
    try:
        request = pb.GenerateRequest(**given)
        if isinstance(prompt, str):
            request.text = prompt
        elif prompt and all(isinstance(part, Message) for part in prompt):
            for part in prompt:
                assert isinstance(part, Message)
                request.chat.messages.add(role=part.role, content=part.content)
        else:
            request.token_ids.ids.extend(prompt)  # type: ignore[arg-type]  # refused if it is not
    except (TypeError, ValueError) as error:
        raise InvalidRequest("request", prompt, f"what its message can hold ({error})") from None
    return request
