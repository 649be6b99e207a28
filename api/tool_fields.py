"""Which tools an answer may call: `tools`, `tool_choice` and `parallel_tool_calls`."""

import json
import re
from dataclasses import dataclass
from typing import Any

from baton.api.fields import Fields
from baton.api.grammar_fields import schema_source
from baton.api.tool_calls import ToolFormat, ToolUse
from baton.core.errors import InvalidRequest
from baton.core.grammar import Grammar
from baton.models.chat_template import ChatTemplate

MAX_TOOLS = 128
TOOL_NAME = r"[A-Za-z0-9_.-]{1,64}"

_DEFINITIONS = ("$defs", "definitions")
_NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True, slots=True)
class Tools:
    """What the prompt shows, how calls are found in the output, and what makes it hold calls."""

    shown: tuple[dict[str, Any], ...] | None = None
    use: ToolUse | None = None
    grammar: Grammar | None = None


def read_tools(fields: Fields, template: ChatTemplate | None, form: ToolFormat | None) -> Tools:
    """Read all fields about tools. `template` renders them; `form` is how the model writes calls.

    With `tool_choice` none the model is not shown any tool.
    """
    tools = _tools(fields.take("tools"))
    choice = fields.take("tool_choice")
    one = not fields.flag("parallel_tool_calls", True)
    if choice is None:
        choice = "auto" if tools else "none"
    if not tools and choice not in ("none", "auto"):
        raise InvalidRequest("tool_choice", choice, "none or auto, as there are no tools")
    if not tools or choice == "none":
        return Tools()
    if template is None or not template.takes_tools:
        allowed = "none: this model's chat template has no place for tools"
        raise InvalidRequest("tools", f"{len(tools)} tools", allowed)
    schemas = {row["function"]["name"]: row["function"].get("parameters") for row in tools}
    names = frozenset(schemas)
    if choice == "auto":
        if form is None:
            allowed = "none, required or a named tool: how this model writes calls is not known"
            raise InvalidRequest("tool_choice", choice, allowed)
        return Tools(tools, ToolUse(form, names, one=one))
    if choice == "required":
        use = ToolUse("required", names, one=one)
        return Tools(tools, use, Grammar("json_schema", _any_call(schemas, one=one)))
    named = _named(choice, names)
    schema = json.dumps(schemas[named] or _NO_ARGUMENTS, ensure_ascii=False, separators=(",", ":"))
    return Tools(tools, ToolUse("named", names, named=named), Grammar("json_schema", schema))


def _tools(value: object) -> tuple[dict[str, Any], ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or len(value) > MAX_TOOLS:
        raise InvalidRequest("tools", value, f"a list of at most {MAX_TOOLS} tools")
    tools = tuple(_tool(f"tools[{index}]", tool) for index, tool in enumerate(value))
    names = [tool["function"]["name"] for tool in tools]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise InvalidRequest(f"tools[{index}].function.name", name, "each name once")
    return tools


def _tool(where: str, value: object) -> dict[str, Any]:
    fields = Fields(value, where=where)
    kind = fields.take("type")
    if kind != "function":
        raise InvalidRequest(f"{where}.type", kind, "function")
    inner = f"{where}.function"
    function = Fields(fields.take("function"), where=inner)
    fields.done()
    shown: dict[str, Any] = {"name": _name(f"{inner}.name", function.take("name"))}
    description = function.text("description")
    if description is not None:
        shown["description"] = description
    parameters = function.take("parameters")
    if parameters is not None:
        schema_source(f"{inner}.parameters", parameters)
        shown["parameters"] = parameters
    function.flag("strict", False)
    function.done()
    return {"type": "function", "function": shown}


def _name(field: str, value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch(TOOL_NAME, value):
        raise InvalidRequest(field, value, f"a name like {TOOL_NAME}")
    return value


def _named(choice: object, names: frozenset[str]) -> str:
    if not isinstance(choice, dict):
        raise InvalidRequest("tool_choice", choice, "none, auto, required or a named function")
    fields = Fields(choice, where="tool_choice")
    kind = fields.take("type")
    if kind != "function":
        raise InvalidRequest("tool_choice.type", kind, "function")
    function = Fields(fields.take("function"), where="tool_choice.function")
    name = function.take("name")
    function.done()
    fields.done()
    if not isinstance(name, str) or name not in names:
        raise InvalidRequest(
            "tool_choice.function.name", name, f"one of {', '.join(sorted(names))}"
        )
    return name


def _any_call(schemas: dict[str, Any], *, one: bool) -> str:
    """Return the schema of a list of calls, as vLLM writes it.

    Definitions move to the root, where references look for them.
    """
    definitions: dict[str, dict[str, Any]] = {}
    calls = []
    for name, schema in schemas.items():
        inner = dict(schema or _NO_ARGUMENTS)
        for key in _DEFINITIONS:
            for label, body in inner.pop(key, {}).items():
                if definitions.setdefault(key, {}).setdefault(label, body) != body:
                    allowed = f"one meaning of {key}/{label} for all tools"
                    raise InvalidRequest("tools", f"{name}: {key}/{label}", allowed)
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"enum": [name]}, "parameters": inner},
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
        )
    limit = {"maxItems": 1} if one else {}
    whole = {"type": "array", "minItems": 1, **limit, "items": {"anyOf": calls}, **definitions}
    return schema_source("tools", whole)
