"""The messages of a chat: checked, and as chat templates want them."""

import json
from typing import Any

from baton.api.fields import Fields, check_text
from baton.api.known_fields import ASSISTANT
from baton.core.errors import InvalidRequest
from baton.models.chat_template import ChatOptions, ChatTemplate

MAX_MESSAGES = 4096
MAX_CALLS = 128
"""Tool calls of one message."""
ROLES = ("system", "developer", "user", "assistant", "tool")

_RESERVED = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message")
"""Variables of a template that have fields of their own."""

Message = dict[str, Any]


def read_messages(value: object, template: ChatTemplate | None) -> list[Message]:
    """Return the messages; content is always one text, and arguments of calls are objects."""
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_MESSAGES:
        raise InvalidRequest("messages", value, f"a list of 1 to {MAX_MESSAGES} messages")
    messages = [_message(f"messages[{index}]", message) for index, message in enumerate(value)]
    if template is not None and not template.takes_tool_calls:
        for index, message in enumerate(messages):
            field = "tool_calls" if "tool_calls" in message else "role"
            if message["role"] == "tool" or "tool_calls" in message:
                allowed = "none of tools: this model's chat template has no place for calls"
                raise InvalidRequest(f"messages[{index}].{field}", message[field], allowed)
    return messages


def read_chat_options(
    fields: Fields, template: ChatTemplate | None, tools: tuple[dict[str, Any], ...] | None
) -> ChatOptions:
    """Read how the chat is to be rendered."""
    goes_on = fields.flag("continue_final_message", False)
    opens = fields.flag("add_generation_prompt", not goes_on)
    if goes_on and opens:
        allowed = "false, as continue_final_message is true"
        raise InvalidRequest("add_generation_prompt", True, allowed)
    variables = fields.take("chat_template_kwargs")
    variables = {} if variables is None else variables
    if not isinstance(variables, dict):
        raise InvalidRequest("chat_template_kwargs", variables, "an object")
    for name in _RESERVED:
        if name in variables:
            field = f"chat_template_kwargs.{name}"
            raise InvalidRequest(field, variables[name], "nothing: it has a field of its own")
    effort = fields.text("reasoning_effort")
    if effort is not None:
        if template is None or "reasoning_effort" not in template.variables:
            allowed = "none: this model's chat template knows no such thing"
            raise InvalidRequest("reasoning_effort", effort, allowed)
        variables = {"reasoning_effort": effort} | variables
    return ChatOptions(
        add_generation_prompt=opens,
        continue_final_message=goes_on,
        tools=tools,
        variables=variables,
    )


def _message(where: str, value: object) -> Message:
    fields = Fields(value, where=where)
    role = fields.take("role")
    if role not in ROLES:
        raise InvalidRequest(f"{where}.role", role, f"one of {', '.join(ROLES)}")
    message: Message = {"role": role}
    name = fields.text("name")
    if name is not None:
        message["name"] = name
    content = fields.take("content")
    if role == "assistant":
        message |= _assistant(where, fields)
    else:
        fields.only(dict.fromkeys(("tool_calls", *ASSISTANT), ([],)))
    if role == "tool":
        message["tool_call_id"] = check_text(f"{where}.tool_call_id", fields.take("tool_call_id"))
    if content is None and role == "assistant":  # as of one that only called tools
        content = ""
    message["content"] = _content(f"{where}.content", content)
    fields.done()
    return message


def _assistant(where: str, fields: Fields) -> Message:
    """Read what only the model's own messages have."""
    fields.only(ASSISTANT)
    fields.take("parsed")  # what OpenAI's client made of the content
    found: Message = {}
    reasoning = fields.text("reasoning_content")
    if reasoning is not None:
        found["reasoning_content"] = reasoning
    calls = fields.take("tool_calls")
    if calls is None or calls == []:
        return found
    if not isinstance(calls, list) or len(calls) > MAX_CALLS:
        raise InvalidRequest(f"{where}.tool_calls", calls, f"a list of at most {MAX_CALLS} calls")
    found["tool_calls"] = [
        _call(f"{where}.tool_calls[{index}]", call) for index, call in enumerate(calls)
    ]
    return found


def _call(where: str, value: object) -> Message:
    fields = Fields(value, where=where)
    call_id = check_text(f"{where}.id", fields.take("id"))
    kind = fields.take("type")
    if kind not in (None, "function"):
        raise InvalidRequest(f"{where}.type", kind, "function")
    fields.take("index")  # left over where a client put it together from a stream
    function = Fields(fields.take("function"), where=f"{where}.function")
    name = check_text(f"{where}.function.name", function.take("name"))
    arguments = _arguments(f"{where}.function.arguments", function.take("arguments"))
    function.take("parsed_arguments")  # what OpenAI's client made of them
    function.done()
    fields.done()
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _arguments(field: str, value: object) -> dict[str, Any]:
    """Return the object that templates want; OpenAI's clients send it as a string."""
    found: object = value
    if isinstance(value, str):
        try:
            found = json.loads(value) if value.strip() else {}
        except (ValueError, RecursionError):
            found = None
    if not isinstance(found, dict):
        raise InvalidRequest(field, value, "a JSON object, written as a string")
    return found


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
