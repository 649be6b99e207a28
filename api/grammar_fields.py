"""What the output must match, as users say it: OpenAI's `response_format`, and vLLM's fields."""

import json
from collections.abc import Iterator
from typing import Any

from jsonschema import SchemaError
from jsonschema.validators import Draft202012Validator, validator_for

from baton.api.fields import Fields, check_text
from baton.core.errors import InvalidRequest
from baton.core.grammar import MAX_GRAMMAR_BYTES, Grammar

MAX_SCHEMA_DEPTH = 64
MAX_GRAMMAR_CHOICES = 1024

_KINDS = ("json", "json_object", "regex", "choice", "grammar")
"""What vLLM's `structured_outputs` has, and with `guided_` before it its older fields."""


def read_grammar(fields: Fields) -> tuple[str, Grammar] | None:
    """Return the field that constrains the output and what it says; several are refused."""
    found = [*_response_format(fields), *_structured_outputs(fields)]
    for kind in _KINDS:
        found += _grammar(f"guided_{kind}", kind, fields.take(f"guided_{kind}"))
    if len(found) > 1:
        raise InvalidRequest(found[1][0], "a second grammar", f"one, as {found[0][0]} is there")
    return found[0] if found else None


def _response_format(fields: Fields) -> Iterator[tuple[str, Grammar]]:
    value = fields.take("response_format")
    if value is None:
        return
    options = Fields(value, where="response_format")
    kind = options.take("type")
    match kind:
        case "text":
            pass
        case "json_object":
            yield "response_format", Grammar("json_object", "")
        case "json_schema":
            yield "response_format", _named_schema(options.take("json_schema"))
        case "regex" | "grammar":
            where = f"response_format.{kind}"
            yield from _grammar(where, kind, _needed(where, options.take(kind)))
        case _:
            allowed = "text, json_object, json_schema, regex or grammar"
            raise InvalidRequest("response_format.type", kind, allowed)
    options.done()


def _named_schema(value: object) -> Grammar:
    where = "response_format.json_schema"
    told = Fields(value, where=where)
    for name in ("name", "description"):  # labels
        told.text(name)
    told.flag("strict", True)  # The schema is kept to either way.
    schema = _needed(f"{where}.schema", told.take("schema"))
    told.done()
    return Grammar("json_schema", schema_source(f"{where}.schema", schema))


def _structured_outputs(fields: Fields) -> Iterator[tuple[str, Grammar]]:
    value = fields.take("structured_outputs")
    if value is None:
        return
    options = Fields(value, where="structured_outputs")
    for kind in _KINDS:
        yield from _grammar(f"structured_outputs.{kind}", kind, options.take(kind))
    options.only(
        {
            "structural_tag": (),
            "whitespace_pattern": (),
            "disable_fallback": (True, False),
            "disable_any_whitespace": (False,),
            "disable_additional_properties": (False,),
        }
    )
    options.done()


def _grammar(field: str, kind: str, value: object) -> Iterator[tuple[str, Grammar]]:
    if value is None:
        return
    match kind:
        case "json":
            yield field, Grammar("json_schema", schema_source(field, _parsed(field, value)))
        case "json_object":
            if not isinstance(value, bool):
                raise InvalidRequest(field, value, "true or false")
            if value:
                yield field, Grammar("json_object", "")
        case "regex":
            yield field, Grammar("regex", _source(field, value))
        case "grammar":
            yield field, Grammar("lark", _source(field, value))
        case "choice":
            yield field, Grammar("choice", _choices(field, value))


def _needed(field: str, value: object) -> object:
    if value is None:
        raise InvalidRequest(field, None, "a value: it is required")
    return value


def _source(field: str, value: object) -> str:
    source = check_text(field, value)
    if not 1 <= len(source.encode()) <= MAX_GRAMMAR_BYTES:
        raise InvalidRequest(field, f"{len(source)} characters", f"1 to {MAX_GRAMMAR_BYTES} bytes")
    return source


def _choices(field: str, value: object) -> str:
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_GRAMMAR_CHOICES:
        raise InvalidRequest(field, value, f"a list of 1 to {MAX_GRAMMAR_CHOICES} strings")
    for index, choice in enumerate(value):
        if not check_text(f"{field}[{index}]", choice):
            raise InvalidRequest(f"{field}[{index}]", choice, "at least one character")
    return _source(field, json.dumps(value, ensure_ascii=False))


def _parsed(field: str, value: object) -> object:
    """Return a schema that may be written as a string, as vLLM has it."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(field, value, f"a JSON schema ({error})") from None


def schema_source(field: str, schema: object) -> str:
    """Return a JSON schema as JSON; InvalidRequest if it is none, or too large, or not by itself.

    Refused are schemas beyond 64 KiB or 64 levels, and references to other documents.
    """
    if not isinstance(schema, dict):
        raise InvalidRequest(field, schema, "a JSON schema, which is an object")
    _check_depth(field, schema)
    try:
        source = json.dumps(schema, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        source.encode()
    except ValueError as error:
        raise InvalidRequest(field, schema, f"a JSON schema ({error})") from None
    if len(source.encode()) > MAX_GRAMMAR_BYTES:
        raise InvalidRequest(
            field, f"{len(source)} characters", f"at most {MAX_GRAMMAR_BYTES} bytes"
        )
    try:
        kind = validator_for(schema, default=Draft202012Validator)
        kind.check_schema(schema)
    except (SchemaError, TypeError, ValueError, LookupError) as error:
        reason = error.message if isinstance(error, SchemaError) else str(error)
        raise InvalidRequest(field, schema, f"a JSON schema ({reason[:200]})") from None
    return source


def _check_depth(field: str, schema: dict[str, Any]) -> None:
    """Look at every level without recursion; a stack is not what should bound it."""
    level: list[object] = [schema]
    for _ in range(MAX_SCHEMA_DEPTH):
        deeper: list[object] = []
        for value in level:
            if isinstance(value, dict):
                ref = value.get("$ref")
                if isinstance(ref, str) and not ref.startswith("#"):
                    raise InvalidRequest(
                        f"{field}: $ref", ref, "a reference within the schema, #/…"
                    )
                deeper += value.values()
            elif isinstance(value, list):
                deeper += value
        if not deeper:
            return
        level = deeper
    raise InvalidRequest(field, "a schema", f"at most {MAX_SCHEMA_DEPTH} levels")
