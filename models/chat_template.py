"""Renders a checkpoint's chat template, a Jinja program, in a sandbox.

The environment is the one that Hugging Face promises to templates: blocks trimmed, loop controls,
`raise_exception`, `strftime_now` and a `tojson` that does not escape HTML.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from baton.core.errors import InvalidConfig, InvalidRequest

Message = Mapping[str, Any]


def find_template(model_dir: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    """Return the folder's chat template: chat_template.jinja, or the one in tokenizer_config.json.

    Where the config lists several, it is the one named `default`; None where there is none.
    """
    file = model_dir / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    found = tokenizer_config.get("chat_template")
    if isinstance(found, list):
        named = {entry["name"]: entry["template"] for entry in found}
        found = named.get("default")
    if found is not None and not isinstance(found, str):
        raise InvalidConfig("tokenizer_config.json: chat_template", found, "a Jinja template")
    return found


class ChatTemplate:
    """One compiled template."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Compile `source`; templates see `special_tokens` as variables, such as bos_token.

        Raises InvalidConfig if it is no Jinja template.
        """
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self._special_tokens = dict(special_tokens)
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise InvalidConfig("chat_template", source, f"a Jinja template ({error})") from None

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """Return the prompt's text for `messages`.

        Raises InvalidRequest if the template refuses them, for example for the order of roles.
        """
        try:
            return self._template.render(
                messages=list(messages),
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except (TemplateError, TypeError, ValueError, LookupError) as error:
            allowed = f"what the model's chat template accepts ({error})"
            raise InvalidRequest("messages", list(messages), allowed) from None


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
