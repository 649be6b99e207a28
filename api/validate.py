"""User input becomes GenerateRequests here, or InvalidRequest: refused here or never."""

import secrets
from collections.abc import Callable
from dataclasses import dataclass

from baton.api.fields import Fields, check_text
from baton.api.sampling_fields import (
    check_token,
    of_choice,
    read_chat_logprobs,
    read_completion_logprobs,
    read_sampling,
    read_stop_tokens,
)
from baton.core.errors import InvalidRequest, UnknownModel
from baton.core.ids import RequestId
from baton.core.request import GenerateRequest, SamplingParams
from baton.core.tenants import ANONYMOUS, Tenant
from baton.models.tokenizer import Tokenizer

INLINE_BYTES = 16 << 10
"""What is larger is checked and tokenised in a thread, so that it does not hold up others."""
MAX_CHOICES = 128
"""Of one request: prompts times n."""
MAX_STOP = 4
MAX_STOP_LENGTH = 256
"""Characters of one stop string."""
MAX_MESSAGES = 4096
DEFAULT_MAX_TOKENS = 16
"""Of completions, as OpenAI has it; a chat may go on to the limit."""

_ROLES = ("system", "developer", "user", "assistant")
_NO: tuple[object, ...] = ()
_UNSUPPORTED_COMPLETION: dict[str, tuple[object, ...]] = {"echo": (False,), "suffix": ("",)}
_UNSUPPORTED_CHAT: dict[str, tuple[object, ...]] = {
    "tools": ([],),
    "tool_choice": ("none",),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": _NO,
    "prediction": _NO,
    "reasoning_effort": _NO,
    "verbosity": _NO,
    "web_search_options": _NO,
    "store": (False,),
    "service_tier": ("auto", "default"),
}
_IGNORED = ("user", "safety_identifier", "prompt_cache_key", "metadata")
"""Labels for somebody's own bookkeeping; they promise no effect on the output."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What a request is checked against."""

    name: str
    tokenizer: Tokenizer
    max_model_len: int
    """Tokens of prompt and output together that some decode instance can hold."""
    tenant: Tenant = ANONYMOUS
    """Who asks, and so within which limits."""


@dataclass(frozen=True, slots=True)
class TextRequest:
    """A valid request, and the stop strings, of which only api/ knows."""

    generate: GenerateRequest
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Call:
    """A valid API call."""

    call_id: str
    requests: tuple[TextRequest, ...]
    """One per choice: those of the first prompt, then those of the next."""
    choices_per_prompt: int = 1
    stream: bool = False
    include_usage: bool = False
    """A stream ends with a chunk that has the usage."""


@dataclass(frozen=True, slots=True)
class _Common:
    sampling: SamplingParams
    n: int
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    stream: bool
    include_usage: bool
    priority: int


def completion_call(body: object, model: ServedModel, *, prefix: str = "cmpl") -> Call:
    """Check the body of /v1/completions."""
    fields = Fields(body)
    fields.only(_UNSUPPORTED_COMPLETION)
    common = _common(fields, model, read_completion_logprobs)
    fields.only({"best_of": (common.n,)})
    max_tokens = _max_tokens(fields, "max_tokens", model)
    prompts = _prompts(fields.take("prompt"), model)
    fields.done()
    if len(prompts) * common.n > MAX_CHOICES:
        allowed = f"at most {MAX_CHOICES // len(prompts)} for {len(prompts)} prompts"
        raise InvalidRequest("n", common.n, allowed)
    limits = _Limits("prompt", max_tokens, DEFAULT_MAX_TOKENS)
    return _call(_new_id(prefix), prompts, limits, common, model)


def chat_call(body: object, model: ServedModel) -> Call:
    """Check the body of /v1/chat/completions."""
    fields = Fields(body)
    fields.only(_UNSUPPORTED_CHAT)
    common = _common(fields, model, read_chat_logprobs)
    old = _max_tokens(fields, "max_tokens", model)
    new = _max_tokens(fields, "max_completion_tokens", model)
    messages = _messages(fields.take("messages"))
    fields.done()
    prompt = model.tokenizer.apply_chat_template(messages)
    limits = _Limits("messages", old if new is None else new, model.max_model_len)
    return _call(_new_id("chatcmpl"), [prompt], limits, common, model)


def _common(
    fields: Fields, model: ServedModel, read_logprobs: Callable[[Fields], int | None]
) -> _Common:
    name = fields.text("model")
    if name is not None and name != model.name:
        raise UnknownModel("model", name, model.name)
    for label in _IGNORED:
        fields.take(label)
    stream = fields.flag("stream", False)
    return _Common(
        sampling=read_sampling(fields, model.tokenizer, read_logprobs(fields)),
        n=fields.integer("n", 1, low=1, high=MAX_CHOICES) or 1,
        stop=_stop(fields.take("stop")),
        stop_token_ids=read_stop_tokens(fields, model.tokenizer),
        stream=stream,
        include_usage=_include_usage(fields, stream),
        priority=_priority(fields, model.tenant),
    )


def _priority(fields: Fields, tenant: Tenant) -> int:
    low, high = tenant.priority_min, tenant.priority_max
    asked = fields.integer("priority", None, low=low, high=high)
    return tenant.default_priority if asked is None else asked


def _include_usage(fields: Fields, stream: bool) -> bool:
    value = fields.take("stream_options")
    if value is None:
        return False
    if not stream:
        raise InvalidRequest("stream_options", value, "leave it out unless stream is true")
    options = Fields(value, where="stream_options")
    include_usage = options.flag("include_usage", False)
    options.only({"include_obfuscation": (False,)})
    options.done()
    return include_usage


def _stop(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    strings = value if isinstance(value, list) else [value]
    if len(strings) > MAX_STOP:
        raise InvalidRequest("stop", value, f"at most {MAX_STOP} strings")
    for index, string in enumerate(strings):
        field = f"stop[{index}]" if isinstance(value, list) else "stop"
        if not 1 <= len(check_text(field, string)) <= MAX_STOP_LENGTH:
            raise InvalidRequest(field, string, f"1 to {MAX_STOP_LENGTH} characters")
    return tuple(dict.fromkeys(strings))


def _max_tokens(fields: Fields, name: str, model: ServedModel) -> int | None:
    return fields.integer(name, None, low=1, high=model.max_model_len - 1)


def _prompts(value: object, model: ServedModel) -> list[list[int]]:
    """Read a string, a list of strings, a list of token ids, or a list of lists of these."""
    if not isinstance(value, list):
        return [_prompt("prompt", value, model)]
    if not value:
        raise InvalidRequest("prompt", value, "at least one token id or one prompt")
    if isinstance(value[0], int):
        return [_prompt("prompt", value, model)]
    if len(value) > MAX_CHOICES:
        raise InvalidRequest("prompt", f"{len(value)} prompts", f"at most {MAX_CHOICES} prompts")
    kind = type(value[0])
    for index, prompt in enumerate(value):
        if type(prompt) is not kind:
            raise InvalidRequest(f"prompt[{index}]", prompt, "the same type as prompt[0]")
    return [_prompt(f"prompt[{index}]", prompt, model) for index, prompt in enumerate(value)]


def _prompt(field: str, value: object, model: ServedModel) -> list[int]:
    if isinstance(value, str):
        return model.tokenizer.encode(check_text(field, value))
    if not isinstance(value, list):
        raise InvalidRequest(field, value, "a string, or a list of token ids")
    for index, token in enumerate(value):
        check_token(f"{field}[{index}]", token, model.tokenizer)
    return value


def _messages(value: object) -> list[dict[str, str]]:
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_MESSAGES:
        raise InvalidRequest("messages", value, f"a list of 1 to {MAX_MESSAGES} messages")
    return [_message(f"messages[{index}]", message) for index, message in enumerate(value)]


def _message(where: str, value: object) -> dict[str, str]:
    fields = Fields(value, where=where)
    role = fields.take("role")
    if role not in _ROLES:
        raise InvalidRequest(f"{where}.role", role, f"one of {', '.join(_ROLES)}")
    message = {"role": str(role), "content": _content(f"{where}.content", fields.take("content"))}
    name = fields.text("name")
    # A client sends back the assistant messages that it got, with their empty fields.
    empty = ("refusal", "audio", "annotations", "tool_calls", "function_call")
    fields.only(dict.fromkeys(empty, ([],)))
    fields.done()
    return message | ({} if name is None else {"name": name})


def _content(field: str, value: object) -> str:
    if not isinstance(value, list):
        return check_text(field, value)
    return "".join(_part(f"{field}[{index}]", part) for index, part in enumerate(value))


def _part(where: str, value: object) -> str:
    fields = Fields(value, where=where)
    kind = fields.take("type")
    if kind != "text":
        raise InvalidRequest(f"{where}.type", kind, "text")
    text = check_text(f"{where}.text", fields.take("text"))
    fields.done()
    return text


@dataclass(frozen=True, slots=True)
class _Limits:
    field: str
    """What the prompt was made of."""
    max_tokens: int | None
    default: int


def _call(
    call_id: str, prompts: list[list[int]], limits: _Limits, common: _Common, model: ServedModel
) -> Call:
    count = len(prompts) * common.n
    ids = [call_id] if count == 1 else [f"{call_id}-{i}" for i in range(count)]
    requests: list[TextRequest] = []
    for prompt in prompts:
        max_tokens = _fitting(prompt, limits, common, model)
        for choice in range(common.n):
            generate = GenerateRequest(
                request_id=RequestId(ids[len(requests)]),
                prompt=tuple(prompt),
                max_tokens=max_tokens,
                sampling=of_choice(common.sampling, choice),
                stop_token_ids=common.stop_token_ids,
                tenant=model.tenant.name,
                priority=common.priority,
            )
            requests.append(TextRequest(generate, common.stop))
    return Call(call_id, tuple(requests), common.n, common.stream, common.include_usage)


def _fitting(prompt: list[int], limits: _Limits, common: _Common, model: ServedModel) -> int:
    """Return the tokens to generate at most; refuse a prompt that leaves no room for them."""
    room = model.max_model_len - len(prompt)
    if not prompt:
        raise InvalidRequest(limits.field, "", "a prompt of at least one token")
    if room < 1:
        tokens = f"{len(prompt)} tokens"
        raise InvalidRequest(limits.field, tokens, f"at most {model.max_model_len - 1} tokens")
    max_tokens = _allowed(prompt, limits, model.tenant)
    if max_tokens is None:
        most = model.tenant.max_output_tokens
        max_tokens = min(limits.default, room if most is None else min(room, most))
    if max_tokens > room:
        both = f"the prompt has {len(prompt)} tokens, the limit for both is {model.max_model_len}"
        raise InvalidRequest("max_tokens", max_tokens, f"1 to {room}: {both}")
    if common.sampling.min_tokens > max_tokens:
        allowed = f"0 to max_tokens, which is {max_tokens}"
        raise InvalidRequest("min_tokens", common.sampling.min_tokens, allowed)
    return max_tokens


def _allowed(prompt: list[int], limits: _Limits, tenant: Tenant) -> int | None:
    """Return the limit that was asked for; refuse what the tenant's own limits do not allow."""
    longest, most = tenant.max_prompt_tokens, tenant.max_output_tokens
    if longest is not None and len(prompt) > longest:
        allowed = f"at most {longest} tokens for {tenant.name}"
        raise InvalidRequest(limits.field, f"{len(prompt)} tokens", allowed)
    if limits.max_tokens is not None and most is not None and limits.max_tokens > most:
        raise InvalidRequest("max_tokens", limits.max_tokens, f"1 to {most} for {tenant.name}")
    return limits.max_tokens


def _new_id(prefix: str) -> str:
    return f"{prefix}-{secrets.token_hex(12)}"
