"""Read one tool call, written as a JSON object, while it comes: the arguments are not awaited."""

import json
from collections.abc import Callable
from typing import Literal

_SPACE = " \t\r\n"
_ARGUMENTS = ("arguments", "parameters")


class JsonValue:
    """Finds where one JSON value ends. What is inside is not checked: that is the caller's user."""

    def __init__(self) -> None:
        self.ended = False
        self._begun = False
        self._literal = False
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def takes(self, char: str) -> bool:
        """Whether `char` belongs to the value; may set `ended`, which ends the asking."""
        if not self._begun:
            self._begun = True
            self._literal = char not in '{["'
        if self._literal:
            self.ended = char in ",:}]" or char in _SPACE
            return not self.ended
        if self._in_string:
            self._in_string_takes(char)
        elif char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
        self.ended = not (self._depth or self._in_string)
        return True

    def _in_string_takes(self, char: str) -> None:
        if self._escaped:
            self._escaped = False
        elif char == "\\":
            self._escaped = True
        elif char == '"':
            self._in_string = False


class JsonCall:
    """Reads `{"name": "f", "arguments": {…}}`, in any order and with other fields between.

    `arguments` may be called `parameters`, be a string that holds the object, or be left out.
    """

    def __init__(self) -> None:
        self.status: Literal["open", "done", "failed"] = "open"
        """`failed` once it cannot become a call any more."""
        self.name = ""
        """Set as soon as it is known."""
        self._step: Callable[[str], bool] = self._open
        self._key = ""
        self._raw = ""
        self._value = JsonValue()
        self._arguments = ""
        self._has_arguments = False

    def push(self, text: str) -> int:
        """Read on; return how many characters of `text` belong to it, all unless it ended."""
        at = 0
        while at < len(text) and self.status == "open":
            # A step that does not take its character leaves it to the next.
            at += self._step(text[at])
        return at

    def take_arguments(self) -> str:
        """Return the arguments, as JSON, that have come since the last time; once `name` is set."""
        taken, self._arguments = self._arguments, ""
        return taken

    def _fail(self) -> bool:
        self.status = "failed"
        return False

    def _open(self, char: str) -> bool:
        if char == "{":
            self._step = self._key_or_end
            return True
        return char in _SPACE or self._fail()

    def _key_or_end(self, char: str) -> bool:
        if char in _SPACE:
            return True
        if char == "}":
            return self._close()
        if char != '"':
            return self._fail()
        return self._begin(self._in_key, char)

    def _begin(self, step: Callable[[str], bool], char: str) -> bool:
        self._value, self._raw, self._step = JsonValue(), "", step
        return step(char)

    def _in_key(self, char: str) -> bool:
        self._value.takes(char)
        self._raw += char
        if self._value.ended:
            self._key = _string(self._raw) or ""
            self._step = self._colon
        return True

    def _colon(self, char: str) -> bool:
        if char == ":":
            self._step = self._before_value
            return True
        return char in _SPACE or self._fail()

    def _before_value(self, char: str) -> bool:
        if char in _SPACE:
            return True
        if char in ",:}]":
            return self._fail()
        if char == "{" and self._key in _ARGUMENTS:
            self._has_arguments = True
            return self._begin(self._in_arguments, char)
        return self._begin(self._in_value, char)

    def _in_value(self, char: str) -> bool:
        taken = self._value.takes(char)
        if taken:
            self._raw += char
        if self._value.ended:
            self._step = self._after_value
            self._end_value()
        return taken

    def _in_arguments(self, char: str) -> bool:
        """Pass on an object as it comes, without a copy of the whole."""
        self._value.takes(char)
        self._arguments += char
        if self._value.ended:
            self._step = self._after_value
        return True

    def _end_value(self) -> None:
        if self._key == "name":
            self.name = _string(self._raw) or ""
            if not self.name:
                self._fail()
        elif self._key in _ARGUMENTS:
            # A string holds the object; of anything else nothing can be made.
            self._arguments += _string(self._raw) or ""
            self._has_arguments = bool(self._arguments)

    def _after_value(self, char: str) -> bool:
        if char == ",":
            self._step = self._key_or_end
            return True
        if char == "}":
            return self._close()
        return char in _SPACE or self._fail()

    def _close(self) -> bool:
        self.status = "done" if self.name else "failed"
        if not self._has_arguments:
            self._arguments = "{}"
        return self.status == "done"


def _string(raw: str) -> str | None:
    """Return the string that `raw` is in JSON, or None if it is something else."""
    try:
        value = json.loads(raw, strict=False)
        if isinstance(value, str):
            value.encode()  # half of a surrogate pair could not be sent on
            return value
    except ValueError:
        pass
    return None
