"""The page about the HTTP API, made from the OpenAPI description that a gateway serves."""

import json
from typing import Any

from baton.api.http.openapi import describe
from baton.api.validate import ServedModel
from baton.cli.defaults import DEMO_MODEL
from baton.models.spec import read_spec
from baton.models.tokenizer import load_tokenizer

Schema = dict[str, Any]

_HEAD = """# HTTP API

Made from the description that every gateway serves at `GET /openapi.json`, there with the bounds
of its own model, here with those of the demo model. What the fields are for is told in
[OpenAI's API, and what Baton has beside it](../openai.md) and [Sampling](../sampling.md); errors
have the codes of [Errors](errors.md).
"""
_BODIES = {
    "Completion": "Body of `POST /v1/completions`",
    "Chat": "Body of `POST /v1/chat/completions`",
    "Tokenize": "Body of `POST /tokenize`",
    "Detokenize": "Body of `POST /detokenize`",
}


def http_reference() -> str:
    """Return the page, in Markdown."""
    served = ServedModel(
        "baton-demo", load_tokenizer(DEMO_MODEL), read_spec(DEMO_MODEL).max_position
    )
    described = describe(served)
    parts = [_HEAD, *_paths(described["paths"])]
    for name, title in _BODIES.items():
        parts += [f"\n## {title}\n", *_body(described["components"]["schemas"][name])]
    return "\n".join(parts) + "\n"


def _paths(paths: Schema) -> list[str]:
    lines = ["## Paths\n", "| call | what it does | answers |", "|---|---|---|"]
    for path, methods in paths.items():
        for method, told in methods.items():
            statuses = ", ".join(told["responses"])
            lines.append(f"| `{method.upper()} {path}` | {told['summary']} | {statuses} |")
    lines += ["\nStatuses other than 200, of the calls that have a body:\n", "| status | why |"]
    lines.append("|---|---|")
    errors = paths["/v1/completions"]["post"]["responses"]
    lines += [f"| {s} | {told['description']} |" for s, told in errors.items() if s != "200"]
    return lines


def _body(schema: Schema) -> list[str]:
    """Return the table of fields; of several kinds of body, the fields of all."""
    lines: list[str] = []
    needed, fields = set(schema.get("required", ())), dict(schema.get("properties", {}))
    for kind in schema.get("anyOf", ()):
        lines.append(f"One kind of body has: {_names(kind['required'])}.")
        fields |= kind["properties"]
    free = {name: told for name, told in fields.items() if not _fixed(told)}
    lines += ["\n| field | what is allowed |", "|---|---|"]
    lines += [
        f"| `{name}`{' (needed)' if name in needed else ''} | {_cell(allowed(told))} |"
        for name, told in free.items()
    ]
    fixed = [f"`{name}` ({_cell(allowed(fields[name]))})" for name in fields if name not in free]
    if fixed:
        lines.append("\nTaken only with the value that changes nothing: " + ", ".join(fixed) + ".")
    return lines


def _fixed(schema: Schema) -> bool:
    """Whether there is one value only, beside null."""
    values = {json.dumps(value) for value in schema.get("enum", ()) if value is not None}
    return "enum" in schema and len(values - {"1.0"}) <= 1 and schema["enum"] != ["baton-demo"]


def allowed(schema: Schema) -> str:
    """Say in words which values a schema allows; null, which all may be, is left out."""
    if "anyOf" in schema:
        kinds = [allowed(kind) for kind in schema["anyOf"] if kind != {"type": "null"}]
        return " or ".join(dict.fromkeys(kinds))
    if "enum" in schema or "const" in schema:
        values = schema.get("enum", [schema.get("const")])
        return ", ".join(f"`{json.dumps(v)}`" for v in values if v is not None) or "null"
    types = schema.get("type", [])
    kinds = [t for t in ([types] if isinstance(types, str) else types) if t != "null"]
    if not kinds:
        return "anything"
    return _of_kind(kinds[0], schema)


def _of_kind(kind: str, schema: Schema) -> str:
    if kind in {"integer", "number"}:
        return f"{kind}{_range(schema)}"
    if kind == "array":
        most = f", up to {schema['maxItems']}" if "maxItems" in schema else ""
        return f"list of: {allowed(schema.get('items', {}))}{most}"
    if kind == "object" and schema.get("properties"):
        return f"object with {_names(schema['properties'])}"
    if kind == "string" and "maxLength" in schema:
        return f"string, up to {schema['maxLength']} characters"
    return kind


def _range(schema: Schema) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    if "exclusiveMinimum" in schema:
        return f" over {schema['exclusiveMinimum']:g}, to {high:g}"
    if low is None or high is None:
        return ""
    return f" from {_plain(low)} to {_plain(high)}"


def _plain(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _names(names: Any) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
