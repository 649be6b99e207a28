"""Renders a checkpoint's chat template, a Jinja program, in a sandbox.

The environment is the one that Hugging Face promises to templates: blocks trimmed, loop controls,
`{% generation %}`, `raise_exception`, `strftime_now` and a `tojson` that does not escape HTML.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError, meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from baton.core.errors import InvalidConfig, InvalidRequest

Message = Mapping[str, Any]

_TAG = "<|final message ends here|> "
"""Written after the message that the model is to continue, and looked for in what is rendered. A
template that trims messages takes the space off, and so tells that it trims."""


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """How a chat is rendered, beside its messages; the names are Hugging Face's."""

    add_generation_prompt: bool = True
    """Open the assistant's next message."""
    continue_final_message: bool = False
    """End within the last message, for the model to go on with it; not with the one above."""
    tools: Sequence[Mapping[str, Any]] | None = None
    """Tool definitions as OpenAI writes them."""
    variables: Mapping[str, Any] = field(default_factory=dict)
    """What else the template sees, such as `enable_thinking`; what it has no use for is ignored."""


DEFAULT = ChatOptions()


def find_templates(model_dir: Path, tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """Return the folder's chat templates by name: `default`, and perhaps `tool_use`, for tools.

    They are chat_template.jinja and additional_chat_templates/tool_use.jinja, or stand in
    tokenizer_config.json.
    """
    file = model_dir / "chat_template.jinja"
    if file.is_file():
        found = {"default": file.read_text(encoding="utf-8")}
        more = model_dir / "additional_chat_templates" / "tool_use.jinja"
        return found | ({"tool_use": more.read_text(encoding="utf-8")} if more.is_file() else {})
    told = tokenizer_config.get("chat_template")
    if told is None:
        return {}
    entries = told if isinstance(told, list) else [{"name": "default", "template": told}]
    named = {entry["name"]: entry["template"] for entry in entries}
    kept = {name: named[name] for name in ("default", "tool_use") if name in named}
    for source in kept.values():
        if not isinstance(source, str):
            raise InvalidConfig("tokenizer_config.json: chat_template", source, "a Jinja template")
    return kept


class ChatTemplate:
    """One compiled template."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Compile `source`; templates see `special_tokens` as variables, such as bos_token.

        Raises InvalidConfig if it is no Jinja template.
        """
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _Generation],
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self.source = source
        self._special_tokens = dict(special_tokens)
        try:
            self.variables = frozenset(meta.find_undeclared_variables(environment.parse(source)))
            """Names that it reads and does not set itself."""
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise InvalidConfig("chat_template", source, f"a Jinja template ({error})") from None

    @property
    def takes_tools(self) -> bool:
        """Whether it tells the model which tools there are."""
        return "tools" in self.variables

    @property
    def takes_tool_calls(self) -> bool:
        """Whether it can write down the calls of earlier messages."""
        return "tool_calls" in self.source

    def render(self, messages: Sequence[Message], options: ChatOptions = DEFAULT) -> str:
        """Return the prompt's text for `messages`.

        Raises InvalidRequest if the template refuses them, for example for the order of roles.
        """
        shown = list(messages)
        if options.continue_final_message:
            shown[-1] = {**shown[-1], "content": f"{shown[-1]['content']}{_TAG}"}
        names = {
            **options.variables,
            "messages": shown,
            "tools": None if options.tools is None else list(options.tools),
            "documents": None,
            "add_generation_prompt": options.add_generation_prompt,
            **self._special_tokens,
        }
        try:
            text = self._template.render(names)
            text.encode()
        except (
            TemplateError,
            TypeError,
            ValueError,  # also of text that is no Unicode
            LookupError,
            ArithmeticError,
            RecursionError,
        ) as error:
            allowed = f"what the model's chat template accepts ({error})"
            raise InvalidRequest("messages", list(messages), allowed) from None
        return _cut(text, messages) if options.continue_final_message else text


def _cut(text: str, messages: Sequence[Message]) -> str:
    """Return what is before the tag, as transformers' `continue_final_message` does it."""
    before, tag, after = text.rpartition(_TAG.rstrip())
    content = messages[-1]["content"]
    if not tag or not before.rstrip().endswith(content.strip()):
        allowed = "a last message that the model's chat template shows as it is"
        raise InvalidRequest("continue_final_message", content, allowed)
    return before if after.startswith(" ") else before.rstrip()


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}`, which marks what a model is trained on: no effect."""

    tags = {"generation"}  # noqa: RUF012 - so it is declared in Extension

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return what is between the two tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
