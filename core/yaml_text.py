"""The home of PyYAML: strict YAML for files that people write, with the line of each mistake."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from baton.core.errors import InvalidConfig


def compose(path: Path, text: str) -> Any:
    """Return the root node of a document, which is a mapping and names no key twice.

    Raises InvalidConfig with file and line; `path` is only for that.
    """
    try:
        root = yaml.compose(text, yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise InvalidConfig(f"{path}:{line}", error.problem, "valid YAML") from None
    except yaml.YAMLError as error:
        raise InvalidConfig(f"{path}:1", type(error).__name__, "valid YAML") from None
    if not isinstance(root, yaml.MappingNode):
        raise InvalidConfig(f"{path}:1", "something else", "a mapping of keys to values")
    _check_keys(path, root)
    return root


def values_of(root: Any) -> dict[str, Any]:
    """Return the plain values of a document that `compose` has read."""
    values: dict[str, Any] = yaml.SafeLoader("").construct_document(root)
    return values


def line_of(root: Any, field: Sequence[str]) -> int:
    """Return the line, from 1, of a field, or of the last on the way to it that is there."""
    node, line = root, root.start_mark.line
    for part in field:
        if isinstance(node, yaml.MappingNode):
            pairs = {key.value: (key, value) for key, value in node.value}
            if part not in pairs:
                break
            key, node = pairs[part]
            line = key.start_mark.line
        elif isinstance(node, yaml.SequenceNode) and part.isdigit():
            if int(part) >= len(node.value):
                break
            node = node.value[int(part)]
            line = node.start_mark.line
        else:
            break
    return int(line) + 1


def _check_keys(path: Path, node: Any) -> None:
    """Refuse a mapping that has a key twice, or one that is no string."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_keys(path, item)
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            if key.tag != "tag:yaml.org,2002:str" or key.value in seen:
                where = f"{path}:{key.start_mark.line + 1}"
                raise InvalidConfig(where, key.value, "a text that is a key once")
            seen.add(key.value)
            _check_keys(path, value)
