"""JSON schemas of the bodies: what each field may be by itself, null being the same as absent."""

from collections.abc import Mapping
from typing import Any

from baton.api import known_fields
from baton.api.grammar_fields import MAX_GRAMMAR_CHOICES
from baton.api.message_fields import MAX_CALLS, MAX_MESSAGES, ROLES
from baton.api.sampling_fields import (
    BIAS,
    HIGHEST_REPETITION_PENALTY,
    LOWEST_REPETITION_PENALTY,
    MAX_BAD_WORD_LENGTH,
    MAX_BAD_WORDS,
    MAX_BIASES,
    MAX_LOGPROBS,
    MAX_STOP_TOKENS,
    PENALTY,
)
from baton.api.tool_fields import MAX_TOOLS, TOOL_NAME
from baton.api.validate import (
    LEAST_TIMEOUT_S,
    MAX_CHOICES,
    MAX_STOP,
    MAX_STOP_LENGTH,
    MAX_TIMEOUT_S,
    ServedModel,
)
from baton.core.grammar import MAX_GRAMMAR_BYTES

Schema = dict[str, Any]

_FLAG: Schema = {"type": "boolean"}
_TEXT: Schema = {"type": "string"}
_ANY: Schema = {}


def completion(model: ServedModel) -> Schema:
    """Return the schema of the body of /v1/completions."""
    token = _token(model)
    properties = {
        **_common(model),
        **_only(known_fields.COMPLETION),
        "prompt": {
            "anyOf": [
                {"type": "string", "minLength": 1},
                _list({"type": "string", "minLength": 1}, 1, MAX_CHOICES),
                _list(token, 1, model.max_model_len - 1),
                _list(_list(token, 1, model.max_model_len - 1), 1, MAX_CHOICES),
            ]
        },
        "logprobs": _integer(0, MAX_LOGPROBS),
        "echo": _FLAG,
        "best_of": _integer(1, MAX_CHOICES),
        "add_special_tokens": _FLAG,
    }
    return _object(properties, required=["prompt"])


def chat(model: ServedModel) -> Schema:
    """Return the schema of the body of /v1/chat/completions."""
    properties = {
        **_common(model),
        **_only(known_fields.CHAT),
        **_chat_prompt(),
        "logprobs": _FLAG,
        "top_logprobs": _integer(0, MAX_LOGPROBS),
        "max_completion_tokens": _integer(1, _most_tokens(model)),
    }
    return _object(properties, required=["messages"])


def tokenize(model: ServedModel) -> Schema:
    """Return the schema of the body of /tokenize."""
    both = {"model": {"enum": [model.name, *model.aliases]}, "return_token_strs": _FLAG}
    text = {**both, "prompt": _TEXT, "add_special_tokens": _FLAG}
    chat = {**both, **_only(known_fields.CHAT), **_chat_prompt()}
    return {"anyOf": [_object(text, required=["prompt"]), _object(chat, required=["messages"])]}


def detokenize(model: ServedModel) -> Schema:
    """Return the schema of the body of /detokenize."""
    properties = {"model": {"enum": [model.name, *model.aliases]}, "tokens": _list(_token(model))}
    return _object(properties, required=["tokens"])


def _common(model: ServedModel) -> Schema:
    """Return what both generations share."""
    stop = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_LENGTH}
    bias = {"type": "number", "minimum": -BIAS, "maximum": BIAS}
    word = {"type": "string", "minLength": 1, "maxLength": MAX_BAD_WORD_LENGTH}
    stream_options = {"include_usage": _FLAG, **_only(known_fields.STREAM)}
    penalty = _number(-PENALTY, PENALTY)
    return {
        **dict.fromkeys(known_fields.IGNORED, _ANY),
        **_grammars(),
        "model": {"enum": [model.name, *model.aliases]},
        "max_tokens": _integer(1, _most_tokens(model)),
        "temperature": _number(0, 2),
        "top_k": _integer(0, model.tokenizer.vocab_size),
        "top_p": _over_zero(),
        "min_p": _number(0, 1),
        "typical_p": _over_zero(),
        "repetition_penalty": _number(LOWEST_REPETITION_PENALTY, HIGHEST_REPETITION_PENALTY),
        "presence_penalty": penalty,
        "frequency_penalty": penalty,
        "logit_bias": {
            "type": "object",
            "maxProperties": MAX_BIASES,
            "propertyNames": {"pattern": "^(0|[1-9][0-9]*)$"},
            "additionalProperties": {"anyOf": [bias, {"type": "null"}]},
        },
        "bad_words": _list(word, 0, MAX_BAD_WORDS),
        "seed": _integer(0, 2**63 - 1),
        "n": _integer(1, MAX_CHOICES),
        "stop": {"anyOf": [stop, _list(stop, 0, MAX_STOP)]},
        "stop_token_ids": _list(_token(model), 0, MAX_STOP_TOKENS),
        "min_tokens": _integer(0, _most_tokens(model)),
        "ignore_eos": _FLAG,
        "skip_special_tokens": _FLAG,
        "priority": _integer(model.tenant.priority_min, model.tenant.priority_max),
        "timeout": _number(LEAST_TIMEOUT_S, MAX_TIMEOUT_S),
        "stream": _FLAG,
        "stream_options": _object(stream_options),
    }


def _grammars() -> Schema:
    """Return the fields that constrain the output, of which one may be there."""
    schema = {"type": "object"}
    source = {"type": "string", "minLength": 1, "maxLength": MAX_GRAMMAR_BYTES}
    kinds = {
        "json": {"anyOf": [schema, _TEXT]},
        "json_object": _FLAG,
        "regex": source,
        "choice": _list({"type": "string", "minLength": 1}, 1, MAX_GRAMMAR_CHOICES),
        "grammar": source,
    }
    named = {"name": _TEXT, "description": _TEXT, "strict": _FLAG, "schema": schema}
    forms = [
        _object({"type": {"enum": ["text", "json_object"]}}, required=["type"]),
        _form("json_schema", _object(named, required=["schema"])),
        _form("regex", source),
        _form("grammar", source),
    ]
    return {
        "response_format": {"anyOf": forms},
        "structured_outputs": _object(
            {
                **kinds,
                **_only({"structural_tag": (), "whitespace_pattern": ()}),
                "disable_fallback": _FLAG,
                **_only(
                    dict.fromkeys(
                        ("disable_any_whitespace", "disable_additional_properties"), (False,)
                    )
                ),
            }
        ),
        **{f"guided_{kind}": form for kind, form in kinds.items()},
    }


def _form(kind: str, body: Schema) -> Schema:
    return _object({"type": {"const": kind}, kind: body}, required=["type", kind])


def _chat_prompt() -> Schema:
    """Return what the prompt of a chat is made of."""
    named = _object({"name": {"type": "string"}}, required=["name"])
    choice = _object(
        {"type": {"const": "function"}, "function": named}, required=["type", "function"]
    )
    function = _object(
        {
            "name": {"type": "string", "pattern": f"^{TOOL_NAME}$"},
            "description": _TEXT,
            "parameters": {"type": "object"},
            "strict": _FLAG,
        },
        required=["name"],
    )
    tool = _object(
        {"type": {"const": "function"}, "function": function}, required=["type", "function"]
    )
    return {
        "messages": _list({"anyOf": _messages()}, 1, MAX_MESSAGES),
        "tools": _list(tool, 0, MAX_TOOLS),
        "tool_choice": {"anyOf": [{"enum": ["none", "auto", "required"]}, choice]},
        "parallel_tool_calls": _FLAG,
        "add_generation_prompt": _FLAG,
        "continue_final_message": _FLAG,
        "add_special_tokens": _FLAG,
        "chat_template_kwargs": {"type": "object"},
        "reasoning_effort": _TEXT,
    }


def _messages() -> list[Schema]:
    part = _object({"type": {"const": "text"}, "text": _TEXT}, required=["type", "text"])
    content = {"anyOf": [_TEXT, _list(part)]}
    function = _object(
        {
            "name": _TEXT,
            "arguments": {"anyOf": [_TEXT, {"type": "object"}]},
            "parsed_arguments": _ANY,
        },
        required=["name", "arguments"],
    )
    call = _object(
        {"id": _TEXT, "type": {"enum": ["function", None]}, "function": function, "index": _ANY},
        required=["id", "function"],
    )
    empty = _only(known_fields.ASSISTANT)
    said = {"role": {"enum": [role for role in ROLES if role not in ("assistant", "tool")]}}
    both = {"content": content, "name": _TEXT, **empty}
    none = _only({"tool_calls": ([],)})
    own = {
        **both,
        "role": {"const": "assistant"},
        "reasoning_content": _TEXT,
        "parsed": _ANY,
        "tool_calls": _list(call, 0, MAX_CALLS),
    }
    tool = {**both, **none, "role": {"const": "tool"}, "tool_call_id": _TEXT}
    return [
        _object({**both, **none, **said}, required=["role", "content"]),
        _object(own, required=["role"]),
        _object(tool, required=["role", "content", "tool_call_id"]),
    ]


def _object(properties: Schema, required: list[str] | None = None) -> Schema:
    """Return the schema of an object; what is not required may be null."""
    needed = required or []
    return {
        "type": "object",
        "properties": {
            name: schema if name in needed else _or_null(schema)
            for name, schema in properties.items()
        },
        "required": needed,
        "additionalProperties": False,
    }


def _or_null(schema: Schema) -> Schema:
    if not schema:
        return schema
    if isinstance(schema.get("type"), str):
        return {**schema, "type": [schema["type"], "null"]}
    if "enum" in schema:
        return {**schema, "enum": [*schema["enum"], *([] if None in schema["enum"] else [None])]}
    return {"anyOf": [*schema.get("anyOf", [schema]), {"type": "null"}]}


def _only(allowed: Mapping[str, tuple[object, ...]]) -> Schema:
    """Return the fields that may be there only with a value that changes nothing."""
    return {name: {"enum": [*values, None]} for name, values in allowed.items()}


def _integer(low: int, high: int) -> Schema:
    return {"type": "integer", "minimum": low, "maximum": high}


def _number(low: float, high: float) -> Schema:
    return {"type": "number", "minimum": low, "maximum": high}


def _over_zero() -> Schema:
    return {"type": "number", "exclusiveMinimum": 0, "maximum": 1}


def _token(model: ServedModel) -> Schema:
    return _integer(0, model.tokenizer.vocab_size - 1)


def _most_tokens(model: ServedModel) -> int:
    """Return how many tokens the caller may ask for."""
    return min(model.max_model_len - 1, model.most_output[0])


def _list(items: Schema, low: int = 0, high: int | None = None) -> Schema:
    most = {} if high is None else {"maxItems": high}
    return {"type": "array", "items": items, "minItems": low, **most}
