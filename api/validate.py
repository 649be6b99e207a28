"""User input becomes GenerateRequests here, or InvalidRequest: refused here or never."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast

from baton.api import known_fields
from baton.api.detokenize import Detokenizer, WithSpecialTokens
from baton.api.fields import Fields, check_text
from baton.api.grammar_fields import read_grammar
from baton.api.message_fields import read_chat_options, read_messages
from baton.api.request_names import new_call_id
from baton.api.sampling_fields import (
    check_token,
    of_choice,
    read_chat_logprobs,
    read_completion_logprobs,
    read_sampling,
    read_stop_tokens,
)
from baton.api.tool_calls import ToolFormat, ToolUse, format_of
from baton.api.tool_fields import Tools, read_tools
from baton.core.errors import InvalidRequest, UnknownModel
from baton.core.ids import RequestId
from baton.core.request import GenerateRequest, SamplingParams
from baton.core.served_model import ModelLimits
from baton.core.spans import Arrival
from baton.core.tenants import ANONYMOUS, Tenant
from baton.models.grammar import check_grammar
from baton.models.tokenizer import Tokenizer

INLINE_BYTES = 16 << 10
"""What is larger is checked and tokenised in a thread, so that it does not hold up others."""
MAX_CHOICES = 128
"""Of one request: prompts times n."""
MAX_STOP = 4
MAX_STOP_LENGTH = 256
"""Characters of one stop string."""
LEAST_TIMEOUT_S, MAX_TIMEOUT_S = 0.001, 86_400.0
"""That a caller may ask for; more than the gateway's own changes nothing."""
_LAST_TOKENS = 16
"""Of a prompt, more than a character can begin in."""
DEFAULT_MAX_TOKENS = 16
"""Of completions, as OpenAI has it; a chat may go on to the limit."""

_SESSION = ("session", "prompt_cache_key", "user")
"""Of these labels, the first that is a text says which requests belong together."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What a request is checked against."""

    name: str
    tokenizer: Tokenizer
    max_model_len: int
    """Tokens of prompt and output together that some decode instance can hold."""
    tool_format: ToolFormat | None = None
    """How it writes tool calls of its own accord; None: unknown."""
    tenant: Tenant = ANONYMOUS
    """Who asks, and so within which limits."""
    gateway: str = ""
    """Whose the request is, by name; "": of the only one there is."""
    aliases: tuple[str, ...] = ()
    """Other names by which it may be asked for."""
    limits: ModelLimits = ModelLimits()  # noqa: RUF009  (frozen)
    """Its own."""

    @property
    def most_prompt(self) -> tuple[int, str]:
        """Tokens of a prompt at most, and for whom that holds: the tenant or the model."""
        return self._least(self.tenant.max_prompt_tokens, self.limits.max_prompt_tokens)

    @property
    def most_output(self) -> tuple[int, str]:
        """Tokens of one choice at most, and for whom that holds: the tenant or the model."""
        return self._least(self.tenant.max_output_tokens, self.limits.max_output_tokens)

    def _least(self, tenants: int | None, own: int | None) -> tuple[int, str]:
        limits = [(self.max_model_len, self.name)]
        limits += [] if tenants is None else [(tenants, self.tenant.name)]
        limits += [] if own is None else [(own, self.name)]
        return min(limits, key=lambda limit: limit[0])


@dataclass(frozen=True, slots=True)
class TextRequest:
    """A valid request, and what only api/ knows of it."""

    generate: GenerateRequest
    model: str = ""
    """Whose it is, by the model's own name; "": of the first that is served."""
    stop: tuple[str, ...] = ()
    """Strings that end the text."""
    echo: str | None = None
    """The prompt's text, if it is to stand before the output."""
    skip_special_tokens: bool = True
    """Such as <|endoftext|>: they are not shown."""

    session: str = ""
    """Requests of the same one would rather go where the others went; "": of none."""
    arrival: Arrival | None = None
    """When it was found valid, and what that took."""
    timeout_s: float | None = None
    """Within which the whole answer has to be there; None: as the gateway's config has it."""

    def detokenizer(self, tokenizer: Tokenizer) -> Detokenizer:
        """Return what makes text of its output."""
        decoder = tokenizer if self.skip_special_tokens else WithSpecialTokens(tokenizer)
        if self.echo is None:
            return Detokenizer(decoder, self.generate.prompt)
        # A character that begins in the prompt and ends in the output is shown once, and whole.
        detokenizer = Detokenizer(decoder)
        detokenizer.push(self.generate.prompt[-_LAST_TOKENS:])
        return detokenizer


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
    tools: ToolUse | None = None
    """How the answers may call tools."""
    constrained_by: str = ""
    """The field that says of which grammar the output is to be; "" if it may be anything."""
    tell_timing: bool = False
    """The answer says where the time to first token went."""

    def arrived(self, arrival: Arrival, *, tell_timing: bool = False) -> "Call":
        """Return this call as one that arrived so."""
        requests = tuple(replace(request, arrival=arrival) for request in self.requests)
        return replace(self, requests=requests, tell_timing=tell_timing)

    def of_session(self, session: str) -> "Call":
        """Return this call as one of a session; as it is if there is none."""
        if not session:
            return self
        return replace(self, requests=tuple(replace(r, session=session) for r in self.requests))

    def due_within(self, timeout_s: float | None) -> "Call":
        """Return this call with a deadline; what is earlier holds. None: as it is."""
        if timeout_s is None:
            return self
        before = min(timeout_s, self.requests[0].timeout_s or timeout_s)
        return replace(self, requests=tuple(replace(r, timeout_s=before) for r in self.requests))


@dataclass(frozen=True, slots=True)
class _Common:
    sampling: SamplingParams
    n: int
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    stream: bool
    include_usage: bool
    priority: int
    session: str
    timeout_s: float | None
    skip_special_tokens: bool
    constrained_by: str
    """The field that constrains the output; "" if none does."""


def tool_format(option: str, tokenizer: Tokenizer) -> ToolFormat | None:
    """Return how a model writes tool calls: as `--tool-parser` says, or by its chat template."""
    if option != "auto":
        return cast(ToolFormat, option)
    template = tokenizer.tool_template
    return None if template is None else format_of(template.source)


def read_timeout(header: str | None) -> float | None:
    """Return the seconds that the header x-request-timeout-ms allows; None if it is not there."""
    if header is None:
        return None
    most = int(MAX_TIMEOUT_S * 1000)
    if not (header.isascii() and header.isdecimal() and 1 <= int(header[:12]) <= most):
        allowed = f"a whole number of milliseconds from 1 to {most}"
        raise InvalidRequest("x-request-timeout-ms", header, allowed)
    return int(header) / 1000


def completion_call(body: object, model: ServedModel, *, prefix: str = "cmpl") -> Call:
    """Check the body of /v1/completions."""
    fields = Fields(body)
    fields.only(known_fields.COMPLETION)
    common = _common(fields, model, read_completion_logprobs)
    fields.only({"best_of": (common.n,)})
    max_tokens = _max_tokens(fields, "max_tokens", model)
    special = fields.flag("add_special_tokens", True)
    prompts = _prompts(fields.take("prompt"), model, add_special_tokens=special)
    if fields.flag("echo", False):
        if common.sampling.logprobs is not None:
            # They would cost a pass over the vocabulary for each token of the prompt.
            allowed = "false, as logprobs is there: a prompt's logprobs are not computed"
            raise InvalidRequest("echo", True, allowed)
        prompts = [prompt.echoed(common, model) for prompt in prompts]
    fields.done()
    if len(prompts) * common.n > MAX_CHOICES:
        allowed = f"at most {MAX_CHOICES // len(prompts)} for {len(prompts)} prompts"
        raise InvalidRequest("n", common.n, allowed)
    limits = _Limits("prompt", max_tokens, DEFAULT_MAX_TOKENS)
    return _call(new_call_id(prefix, model.gateway), prompts, limits, common, model)


def chat_call(body: object, model: ServedModel) -> Call:
    """Check the body of /v1/chat/completions."""
    fields = Fields(body)
    fields.only(known_fields.CHAT)
    common = _common(fields, model, read_chat_logprobs)
    tools = read_tools(fields, model.tokenizer.tool_template, model.tool_format)
    if tools.use is not None:
        common = _with_tools(common, tools)
    old = _max_tokens(fields, "max_tokens", model)
    new = _max_tokens(fields, "max_completion_tokens", model)
    prompt = read_chat(fields, model, tools)
    fields.done()
    limits = _Limits("messages", old if new is None else new, model.max_model_len)
    call = _call(new_call_id("chatcmpl", model.gateway), [_Prompt(prompt)], limits, common, model)
    return replace(call, tools=tools.use)


def read_chat(fields: Fields, model: ServedModel, tools: Tools) -> list[int]:
    """Read what a chat's prompt is made of, and return the prompt."""
    tokenizer = model.tokenizer
    template = tokenizer.chat_template if tools.shown is None else tokenizer.tool_template
    options = read_chat_options(fields, template, tools.shown)
    messages = read_messages(fields.take("messages"), template)
    special = fields.flag("add_special_tokens", False)
    return tokenizer.apply_chat_template(messages, options, add_special_tokens=special)


def model_named(body: object) -> str | None:
    """Return the name of the model that a body asks for; None if it names none."""
    return Fields(body).text("model")


def check_model(fields: Fields, model: ServedModel) -> None:
    """Refuse the name of another model; none at all means this one."""
    name = fields.text("model")
    if name is not None and name != model.name and name not in model.aliases:
        raise UnknownModel("model", name, ", ".join((model.name, *model.aliases)))


def check_call_grammar(call: Call, model: ServedModel) -> None:
    """Raise InvalidRequest if no output can be made to follow the call's grammar.

    It may take a second: call it in a thread.
    """
    grammar = call.requests[0].generate.sampling.grammar
    if grammar is not None:
        check_grammar(grammar, model.tokenizer, field=call.constrained_by)


def _with_tools(common: _Common, tools: Tools) -> _Common:
    if common.constrained_by:
        allowed = "none, as tools may be called: what it allows is no call"
        raise InvalidRequest(common.constrained_by, "a grammar", allowed)
    # Mistral's tag is a special token.
    skip = common.skip_special_tokens and tools.use is not None and tools.use.form != "mistral"
    return replace(
        common,
        sampling=replace(common.sampling, grammar=tools.grammar),
        skip_special_tokens=skip,
        constrained_by="" if tools.grammar is None else "tools",
    )


def _common(
    fields: Fields, model: ServedModel, read_logprobs: Callable[[Fields], int | None]
) -> _Common:
    check_model(fields, model)
    labels = {label: fields.take(label) for label in known_fields.IGNORED}
    stream = fields.flag("stream", False)
    constrained_by, grammar = read_grammar(fields) or ("", None)
    return _Common(
        sampling=read_sampling(fields, model.tokenizer, read_logprobs(fields), grammar),
        n=fields.integer("n", 1, low=1, high=MAX_CHOICES) or 1,
        stop=_stop(fields.take("stop")),
        stop_token_ids=read_stop_tokens(fields, model.tokenizer),
        stream=stream,
        include_usage=_include_usage(fields, stream),
        priority=_priority(fields, model.tenant),
        skip_special_tokens=fields.flag("skip_special_tokens", True),
        constrained_by=constrained_by,
        session=next((v for n in _SESSION if isinstance(v := labels[n], str) and v), ""),
        timeout_s=fields.number("timeout", 0.0, low=LEAST_TIMEOUT_S, high=MAX_TIMEOUT_S) or None,
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
    options.only(known_fields.STREAM)
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


@dataclass(frozen=True, slots=True)
class _Prompt:
    ids: list[int]
    text: str | None = None
    """As the user wrote it."""
    echo: str | None = None

    def echoed(self, common: _Common, model: ServedModel) -> "_Prompt":
        """Return it with its text as the echo."""
        text = self.text
        if text is None:
            tokens = model.tokenizer
            decoder = tokens if common.skip_special_tokens else WithSpecialTokens(tokens)
            text = Detokenizer(decoder).push(self.ids)
        return replace(self, echo=text)


def _prompts(value: object, model: ServedModel, *, add_special_tokens: bool) -> list[_Prompt]:
    """Read a string, a list of strings, a list of token ids, or a list of lists of these."""

    def read(field: str, prompt: object) -> _Prompt:
        if isinstance(prompt, str):
            text = check_text(field, prompt)
            ids = model.tokenizer.encode(text, add_special_tokens=add_special_tokens)
            return _Prompt(ids, text)
        return _Prompt(read_tokens(field, prompt, model))

    if not isinstance(value, list):
        return [read("prompt", value)]
    if not value:
        raise InvalidRequest("prompt", value, "at least one token id or one prompt")
    if isinstance(value[0], (int, float)):
        return [read("prompt", value)]
    if len(value) > MAX_CHOICES:
        raise InvalidRequest("prompt", f"{len(value)} prompts", f"at most {MAX_CHOICES} prompts")
    kind = type(value[0])
    for index, prompt in enumerate(value):
        if type(prompt) is not kind:
            raise InvalidRequest(f"prompt[{index}]", prompt, "the same type as prompt[0]")
    return [read(f"prompt[{index}]", prompt) for index, prompt in enumerate(value)]


def read_tokens(field: str, value: object, model: ServedModel) -> list[int]:
    """Return a list of token ids."""
    if not isinstance(value, list):
        raise InvalidRequest(field, value, "a string, or a list of token ids")
    tokens = model.tokenizer
    return [check_token(f"{field}[{i}]", token, tokens) for i, token in enumerate(value)]


@dataclass(frozen=True, slots=True)
class _Limits:
    field: str
    """What the prompt was made of."""
    max_tokens: int | None
    default: int


def _call(
    call_id: str, prompts: list[_Prompt], limits: _Limits, common: _Common, model: ServedModel
) -> Call:
    count = len(prompts) * common.n
    ids = [call_id] if count == 1 else [f"{call_id}-{i}" for i in range(count)]
    requests: list[TextRequest] = []
    for prompt in prompts:
        max_tokens = _fitting(prompt.ids, limits, common, model)
        for choice in range(common.n):
            generate = GenerateRequest(
                request_id=RequestId(ids[len(requests)]),
                prompt=tuple(prompt.ids),
                max_tokens=max_tokens,
                sampling=of_choice(common.sampling, choice),
                stop_token_ids=common.stop_token_ids,
                tenant=model.tenant.name,
                priority=common.priority,
            )
            requests.append(
                TextRequest(
                    generate,
                    model.name,
                    common.stop,
                    prompt.echo,
                    common.skip_special_tokens,
                    common.session,
                    timeout_s=common.timeout_s,
                )
            )
    return Call(
        call_id,
        tuple(requests),
        common.n,
        common.stream,
        common.include_usage,
        constrained_by=common.constrained_by,
    )


def _fitting(prompt: list[int], limits: _Limits, common: _Common, model: ServedModel) -> int:
    """Return the tokens to generate at most; refuse a prompt that leaves no room for them."""
    room = model.max_model_len - len(prompt)
    if not prompt:
        raise InvalidRequest(limits.field, "", "a prompt of at least one token")
    if room < 1:
        tokens = f"{len(prompt)} tokens"
        raise InvalidRequest(limits.field, tokens, f"at most {model.max_model_len - 1} tokens")
    max_tokens = _allowed(prompt, limits, model)
    if max_tokens is None:
        max_tokens = min(limits.default, room, model.most_output[0])
    if max_tokens > room:
        both = f"the prompt has {len(prompt)} tokens, the limit for both is {model.max_model_len}"
        raise InvalidRequest("max_tokens", max_tokens, f"1 to {room}: {both}")
    if common.sampling.min_tokens > max_tokens:
        allowed = f"0 to max_tokens, which is {max_tokens}"
        raise InvalidRequest("min_tokens", common.sampling.min_tokens, allowed)
    return max_tokens


def _allowed(prompt: list[int], limits: _Limits, model: ServedModel) -> int | None:
    """Return the limit that was asked for; refuse what tenant or model do not allow."""
    longest, whose = model.most_prompt
    if len(prompt) > longest:
        allowed = f"at most {longest} tokens for {whose}"
        raise InvalidRequest(limits.field, f"{len(prompt)} tokens", allowed)
    most, whose = model.most_output
    if limits.max_tokens is not None and limits.max_tokens > most:
        raise InvalidRequest("max_tokens", limits.max_tokens, f"1 to {most} for {whose}")
    return limits.max_tokens
