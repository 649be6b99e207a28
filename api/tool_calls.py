"""Find the tool calls in a model's text while it comes: text in, events out, pure.

The events of a text, joined, do not depend on how it was cut. What only looks like the beginning
of a call is shown as text once it is certain that it is none.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

from baton.api.json_call import JsonCall, JsonValue
from baton.api.stop_strings import overlap

_LONGEST_NAME = 100
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")

ToolFormat = Literal["hermes", "llama3_json", "mistral"]
"""How models write calls that no grammar makes them write."""


@dataclass(frozen=True, slots=True)
class ToolUse:
    """How an answer may call tools."""

    form: ToolFormat | Literal["named", "required"]
    """`named`: all of the text is the arguments of `named`; `required`: it is a list of calls."""
    names: frozenset[str] = frozenset()
    """The tools that there are."""
    named: str = ""
    one: bool = False
    """Calls after the first are left out."""


@dataclass(frozen=True, slots=True)
class Text:
    """Text for the user."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegins:
    """A call, numbered from 0; its arguments follow."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """The next part of the arguments of a call, JSON as the model wrote it."""

    index: int
    text: str


Event = Text | CallBegins | Arguments


class ToolParser(ABC):
    """What all formats share: input that is not understood yet, calls, and their events.

    `_step` is the state: it takes what it can from `_input`, and returns whether another step may
    follow before more has come.
    """

    def __init__(self, use: ToolUse) -> None:
        self._use = use
        self._input = ""
        self._raw = ""
        """What has been taken of a call whose name is not known: it may turn out to be text."""
        self._begun = False
        self._calls = 0
        self._events: list[Event] = []
        self._step: Callable[[], bool] = self._start

    @abstractmethod
    def _start(self) -> bool:
        """Take the beginning of the text: the first step."""

    def push(self, text: str) -> list[Event]:
        """Return what became certain with `text`."""
        self._input += text
        while self._input and self._step():
            pass
        return self._take()

    def finish(self) -> list[Event]:
        """Return what was held back, at the end of the text."""
        left, self._raw, self._input = self._raw + self._input, "", ""
        # Spaces after a call are only there to part it from the next.
        if not (self._calls and left.isspace()):
            self._emit(left)
        return self._take()

    @property
    def calls(self) -> int:
        """Calls that have begun."""
        return min(self._calls, 1) if self._use.one else self._calls

    def _take(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def _emit(self, text: str) -> None:
        if text:
            self._events.append(Text(text))

    def _begin(self, name: str) -> None:
        self._begun, self._raw = True, ""
        self._calls += 1
        if self._calls == 1 or not self._use.one:
            self._events.append(CallBegins(self._calls - 1, name))

    def _argue(self, text: str) -> None:
        if text and (self._calls == 1 or not self._use.one):
            self._events.append(Arguments(self._calls - 1, text))

    def _show_all(self) -> bool:
        self._emit(self._input)
        self._input = ""
        return False


class _ObjectParser(ToolParser):
    """Formats in which a call is a JSON object."""

    def __init__(self, use: ToolUse) -> None:
        super().__init__(use)
        self._call = JsonCall()

    def _expect_object(self) -> None:
        self._call, self._begun = JsonCall(), False
        self._step = self._object

    def _object(self) -> bool:
        """Take a call that is a JSON object; then `_after_object` or `_no_object` goes on."""
        call = self._call
        taken = call.push(self._input)
        if not self._begun:
            self._raw += self._input[:taken]
        self._input = self._input[taken:]
        if call.name and not self._begun:
            if not self._is_known(call.name):
                return self._no_object()
            self._begin(call.name)
        if self._begun:
            self._argue(call.take_arguments())
        if call.status == "open":
            return False
        self._step = self._after_object if self._begun else self._no_object
        return self._step()

    def _is_known(self, name: str) -> bool:
        return True

    @abstractmethod
    def _after_object(self) -> bool:
        """Take what follows a call."""

    def _no_object(self) -> bool:
        """Show what looked like a call, and all that follows."""
        self._emit(self._raw)
        self._raw = ""
        self._step = self._show_all
        return True

    def _expect_another(self, separator: str, otherwise: Callable[[], bool]) -> bool:
        """Expect another object if `separator` comes next; spaces before it are dropped."""
        self._input = self._input.lstrip()
        if not self._input:
            return False
        if self._input.startswith(separator):
            self._raw, self._input = separator, self._input.removeprefix(separator)
            self._expect_object()
        else:
            self._step = otherwise
        return True

    def _end_list(self, then: Callable[[], bool]) -> bool:
        """Expect another object of a list, or its end."""
        closed = self._input.lstrip().startswith("]")
        if closed:
            self._input = self._input.lstrip().removeprefix("]")
            self._step = then
            return True
        return self._expect_another(",", then)


class _Tagged(_ObjectParser):
    """Formats in which a tag opens each call; there may be text before, between and after."""

    tag: ClassVar[str]

    def _start(self) -> bool:
        self._step = self._find_tag
        return self._find_tag()

    def _find_tag(self) -> bool:
        before, tag, after = self._input.partition(self.tag)
        if not tag:
            held = overlap(before, self.tag)
            # The spaces before a tag are only there to part it from the text.
            shown = before[: len(before) - held].rstrip()
            self._emit(shown)
            self._input = before[len(shown) :]
            return False
        text = before.rstrip()
        self._emit(text)
        self._raw, self._input = before[len(text) :] + tag, after
        self._begun = False
        self._open()
        return True

    @abstractmethod
    def _open(self) -> None:
        """Set the step that follows a tag."""

    def _no_object(self) -> bool:
        """Show the tag, and look for another one in what came after it."""
        lead, tag, rest = self._raw.partition(self.tag)
        self._events.append(Text(lead + tag))
        self._raw, self._input = "", rest + self._input
        self._step = self._find_tag
        return True


class HermesParser(_Tagged):
    """`<tool_call>{"name": …, "arguments": {…}}</tool_call>`: Hermes, Qwen 2.5 and 3."""

    tag = "<tool_call>"
    end = "</tool_call>"

    def _open(self) -> None:
        self._expect_object()

    def finish(self) -> list[Event]:
        """See ToolParser; half of an end tag is none of the user's business."""
        if self._step == self._after_object:
            self._input = ""
        return super().finish()

    def _after_object(self) -> bool:
        self._input = self._input.lstrip()
        if not self._input or (self.end != self._input and self.end.startswith(self._input)):
            return False
        self._input = self._input.removeprefix(self.end)
        self._step = self._find_tag
        return True


class MistralParser(_Tagged):
    """`[TOOL_CALLS][{"name": …, "arguments": {…}}, …]`, or, later, `[TOOL_CALLS]name{…}`."""

    tag = "[TOOL_CALLS]"
    args = "[ARGS]"

    def _open(self) -> None:
        self._step = self._list_or_name

    def _list_or_name(self) -> bool:
        inner = self._input.lstrip()
        if not inner:
            return False
        if not inner.startswith("["):
            self._step = self._name
            return True
        self._raw += self._input[: len(self._input) - len(inner) + 1]
        self._input = inner[1:]
        self._expect_object()
        return True

    def _name(self) -> bool:
        name, brace, _ = self._input.partition("{")
        possible = "\n" not in name and len(name) < _LONGEST_NAME
        if possible and not brace:
            return False
        called = name.strip().removesuffix(self.args).strip()
        if not (possible and _NAME.fullmatch(called)):
            return self._no_object()
        self._input = self._input[len(name) :]
        self._begin(called)
        self._value = JsonValue()
        self._step = self._bare_arguments
        return True

    def _bare_arguments(self) -> bool:
        taken = 0
        while taken < len(self._input) and not self._value.ended:
            self._value.takes(self._input[taken])
            taken += 1
        self._argue(self._input[:taken])
        self._input = self._input[taken:]
        if self._value.ended:
            self._step = self._find_tag
        return self._value.ended

    def _after_object(self) -> bool:
        return self._end_list(self._find_tag)


class ListParser(_ObjectParser):
    """`[{"name": …, "parameters": {…}}, …]`: what the grammar of `required` makes."""

    def _start(self) -> bool:
        inner = self._input.lstrip()
        if not inner:
            return False
        if not inner.startswith("["):
            self._step = self._show_all
            return True
        self._raw = self._input[: len(self._input) - len(inner) + 1]
        self._input = inner[1:]
        self._expect_object()
        return True

    def _after_object(self) -> bool:
        return self._end_list(self._show_all)


class Llama3Parser(_ObjectParser):
    """`{"name": …, "parameters": {…}}`, several with `;` between: Llama 3.1 to 3.3.

    The text is either calls or for the user. As any JSON object looks like a call at first, only
    those of known tools are.
    """

    tag = "<|python_tag|>"

    def _start(self) -> bool:
        inner = self._input.lstrip()
        if not inner or (inner != self.tag and self.tag.startswith(inner)):
            return False
        called = inner.removeprefix(self.tag).lstrip()
        if not called:
            return False
        if not called.startswith("{"):
            self._step = self._show_all
            return True
        self._raw = self._input[: len(self._input) - len(called)]
        self._input = called
        self._expect_object()
        return True

    def _is_known(self, name: str) -> bool:
        return name in self._use.names

    def _after_object(self) -> bool:
        return self._expect_another(";", self._show_all)


class NamedParser(ToolParser):
    """All of the text is the arguments of one tool: what the grammar of a named tool makes."""

    def _start(self) -> bool:
        if not self._begun:
            self._begin(self._use.named)
        self._argue(self._input)
        self._input = ""
        return False


def make_parser(use: ToolUse) -> ToolParser:
    """Return a parser for one answer."""
    kinds: dict[str, type[ToolParser]] = {
        "hermes": HermesParser,
        "llama3_json": Llama3Parser,
        "mistral": MistralParser,
        "named": NamedParser,
        "required": ListParser,
    }
    return kinds[use.form](use)


def format_of(template: str) -> ToolFormat | None:
    """Return how a model writes calls, by its chat template; None: unknown."""
    if "<tool_call>" in template:
        # Qwen3-Coder and others put XML between the same tags.
        return None if "<function=" in template or "<arg_key>" in template else "hermes"
    if "[TOOL_CALLS]" in template:
        return "mistral"
    if "<|python_tag|>" in template or '{"name": function name, "parameters"' in template:
        return "llama3_json"
    return None
