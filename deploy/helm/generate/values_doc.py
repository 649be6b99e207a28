"""The documented values of values.yaml: `# --` above a key says what it is for."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

VALUES = Path(__file__).parent.parent / "baton" / "values.yaml"
_KEY = re.compile(r"^( *)([A-Za-z]+):")
_DEFAULT = "@default -- "


@dataclass(frozen=True, slots=True)
class Value:
    """One documented value."""

    path: tuple[str, ...]
    text: str
    """What it is for, in one line."""
    default: Any
    shown: str
    """The default, in words or as JSON-like YAML."""


def load_values() -> dict[str, Any]:
    """Return the chart's default values."""
    values: dict[str, Any] = yaml.safe_load(VALUES.read_text())
    return values


def documented() -> list[Value]:
    """Return all documented values, in the order of the file."""
    defaults = load_values()
    found: list[Value] = []
    comment: list[str] = []
    open_keys: list[tuple[int, str]] = []
    for line in VALUES.read_text().splitlines():
        stripped = line.strip()
        if stripped.startswith("# -- ") or (stripped.startswith("# ") and comment):
            comment.append(stripped.removeprefix("# -- ").removeprefix("# "))
        elif match := _KEY.match(line):
            indent, key = len(match[1]), match[2]
            open_keys = [(i, k) for i, k in open_keys if i < indent] + [(indent, key)]
            if comment:
                found.append(_value(tuple(k for _, k in open_keys), comment, defaults))
            comment = []
    return found


def _value(path: tuple[str, ...], comment: list[str], defaults: dict[str, Any]) -> Value:
    default: Any = defaults
    for key in path:
        default = default[key]
    shown = [c.removeprefix(_DEFAULT) for c in comment if c.startswith(_DEFAULT)]
    text = " ".join(c for c in comment if not c.startswith(_DEFAULT))
    flow = yaml.safe_dump(default, default_flow_style=True, width=1000).removesuffix("...\n")
    return Value(path, text, default, shown[0] if shown else f"`{flow.strip()}`")
