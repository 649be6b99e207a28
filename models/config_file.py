"""Reads the JSON files of a checkpoint folder; whatever is wrong is named."""

import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from baton.core.errors import InvalidConfig


def read_json(model_dir: Path, name: str) -> dict[str, Any]:
    """Return the object in the folder's file `name`.

    Raises InvalidConfig if the folder or the file is missing, or if it holds no JSON object.
    """
    if not model_dir.is_dir():
        raise InvalidConfig("model_dir", str(model_dir), "a Hugging Face checkpoint folder")
    path = model_dir / name
    if not path.is_file():
        raise InvalidConfig("model_dir", str(model_dir), f"a folder that holds the file {name}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidConfig(name, str(path), f"a readable JSON file ({error})") from None
    if not isinstance(data, dict):
        raise InvalidConfig(name, data, "a JSON object")
    return data


class Fields:
    """The fields of a JSON object, read with a type, a range and a default.

    A field that is absent and one that is null are the same thing.
    """

    def __init__(self, data: Mapping[str, Any], where: str) -> None:
        self._data = data
        self._where = where

    def __repr__(self) -> str:
        return f"<Fields of {self._where}>"

    def name(self, field: str) -> str:
        """Return the field's full name, for messages."""
        return f"{self._where}: {field}"

    def has(self, field: str) -> bool:
        """Say whether the field is there and not null."""
        return self._data.get(field) is not None

    def value(self, field: str) -> Any:
        """Return the field as it is, or None."""
        return self._data.get(field)

    def integer(self, field: str, default: int | None = None, *, least: int = 1) -> int:
        """Return a whole number of at least `least`; without a default the field must be there."""
        value = self._data.get(field)
        value = default if value is None else value
        if type(value) is not int or value < least:
            raise InvalidConfig(self.name(field), value, f"a whole number of at least {least}")
        return value

    def at_most(self, field: str, most: int, default: int) -> int:
        """Return a whole number from 1 to `most`."""
        value = self.integer(field, default)
        if value > most:
            raise InvalidConfig(self.name(field), value, f"at most {most}")
        return value

    def positive(self, field: str, default: float | None = None) -> float:
        """Return a finite number over 0; without a default the field must be there."""
        value = self._data.get(field)
        value = default if value is None else value
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not 0 < value < math.inf
        ):
            raise InvalidConfig(self.name(field), value, "a number over 0")
        return float(value)

    def number(self, field: str, default: float) -> float:
        """Return a finite number of at least 0."""
        value = self._data.get(field)
        value = default if value is None else value
        return (
            0.0
            if value == 0 and value is not False
            else Fields({field: value}, self._where).positive(field)
        )

    def cap(self, field: str, default: float | None) -> float | None:
        """Return a number over 0, or None for null; `default` where the field is absent."""
        if field not in self._data:
            return default
        return self.positive(field) if self.has(field) else None

    def numbers(self, field: str, count: int) -> list[float]:
        """Return `count` numbers over 0."""
        value = self._data.get(field)
        if not isinstance(value, list) or len(value) != count:
            raise InvalidConfig(self.name(field), value, f"a list of {count} numbers")
        return [Fields({field: item}, self._where).positive(field) for item in value]

    def words(self, field: str, count: int, allowed: Collection[str]) -> list[str] | None:
        """Return `count` words of those in `allowed`, or None where there is no such field."""
        value = self._data.get(field)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != count or not set(allowed) >= set(value):
            raise InvalidConfig(
                self.name(field), value, f"{count} words out of {', '.join(sorted(allowed))}"
            )
        return value

    def without(self, field: str, harmless: object, why: str) -> None:
        """Refuse the field unless it is absent, null or `harmless`."""
        value = self._data.get(field)
        if value is not None and value != harmless:
            raise InvalidConfig(self.name(field), value, why)

    def flag(self, field: str, default: bool) -> bool:
        """Return true or false."""
        value = self._data.get(field)
        value = default if value is None else value
        if type(value) is not bool:
            raise InvalidConfig(self.name(field), value, "true or false")
        return value

    def choice(self, field: str, default: str, allowed: Collection[str]) -> str:
        """Return one of the words in `allowed`."""
        value = self._data.get(field)
        value = default if value is None else value
        if not isinstance(value, str) or value not in allowed:
            raise InvalidConfig(self.name(field), value, ", ".join(sorted(allowed)))
        return value

    def section(self, field: str) -> "Fields | None":
        """Return the fields of an object within, or None where there is none."""
        value = self._data.get(field)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise InvalidConfig(self.name(field), value, "a JSON object")
        return Fields(value, f"{self._where}: {field}")
