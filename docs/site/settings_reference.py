"""The pages about commands and about the cluster spec, made from what reads them."""

import json
import types
import typing
from typing import Any, Union

import click
from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from typer.main import get_command

from baton.cli.defaults import DEMO_MODEL
from baton.cli.main import app
from baton.core.cluster_spec import ClusterSpec

_COMMANDS = """# Commands

Made from the commands themselves; `baton COMMAND --help` says the same.
"""
_SPEC = """# Cluster spec

Every field of the YAML file that `baton up -f` reads, made from the classes that check it. What it
does is told in [A cluster that outlives its commands](../cluster.md). `baton serve` makes such a
spec of its flags, and the Helm chart of its values. An unknown field or a bad value is refused with
line, field, value and what is allowed.
"""


_NAMES = {str: "text", int: "whole number", float: "number", bool: "true or false"}


def command_reference() -> str:
    """Return the page about the `baton` command, in Markdown."""
    return _COMMANDS + "".join(_command("baton", get_command(app)))


def _command(name: str, command: Any) -> list[str]:
    """Return a section for a command, or for each of those that it holds."""
    if hasattr(command, "commands"):
        held = command.commands.items()
        return [part for own, sub in held for part in _command(f"{name} {own}", sub)]
    told = click.Context(command, info_name=name)
    usage = " ".join([name, *command.collect_usage_pieces(told)])
    lines = [f"\n## `{name}`\n", command.help or "", f"\n```text\n{usage}\n```\n"]
    options = [param for param in command.params if getattr(param, "help", None)]
    if options:
        lines += ["| option | default | |", "|---|---|---|"]
        lines += [_option(param) for param in options if "--help" not in param.opts]
    return ["\n".join(lines) + "\n"]


def _option(param: Any) -> str:
    names = ", ".join(f"`{name}`" for name in [*param.opts, *param.secondary_opts])
    default = param.default
    if default == DEMO_MODEL:
        default = "demo_model/main"  # which lies elsewhere for everybody
    shown = f"`{default}`" if default not in (None, "") and not param.required else ""
    return f"| {names} | {shown} | {param.help} |"


def spec_reference() -> str:
    """Return the page about the cluster spec, in Markdown."""
    lines, done = [_SPEC], set[type]()
    waiting: list[type[BaseModel]] = [ClusterSpec]
    while waiting:
        kind = waiting.pop(0)
        if kind not in done:
            done.add(kind)
            told = " ".join((kind.__doc__ or "").split())
            lines += [f"\n## {kind.__name__}\n", told, "", "| field | type | default | |"]
            lines += ["|---|---|---|---|"]
            lines += [_field(name, field) for name, field in kind.model_fields.items()]
            waiting += [
                part for field in kind.model_fields.values() for part in _models(field.annotation)
            ]
    return "\n".join(lines) + "\n"


def _field(name: str, field: FieldInfo) -> str:
    told = " ".join((field.description or "").split()).replace("|", "\\|")
    return f"| `{name}` | {_type(field.annotation)} | {_default(field)} | {told} |"


def _default(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True)
    if default is PydanticUndefined:
        return "needed"
    if isinstance(default, BaseModel | SecretStr) or default is None:
        return ""
    return f"`{json.dumps(default, default=str)}`"


def _type(annotation: Any) -> str:
    """Say in words what a field's type is."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type(parts[0])
    if origin is typing.Literal:
        return ", ".join(f"`{part}`" for part in parts)
    if origin in {Union, types.UnionType}:
        return " or ".join(_type(part) for part in parts if part is not types.NoneType)
    if origin is tuple:
        return f"list of {_type(parts[0])}"
    if origin is dict:
        return f"mapping to {_type(parts[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    return _NAMES.get(annotation, str(annotation.__name__).lower())


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Return the classes of settings that a type is made of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in typing.get_args(annotation) for found in _models(part)]
