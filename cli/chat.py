"""`baton chat`: talk to a running server in the terminal.

A line is said to the model; one that begins with a slash is a command. Ctrl-C stops the answer,
and keeps what there is of it; Ctrl-D leaves.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from baton.client.answer import Timing
from baton.client.channel import ClientTls
from baton.client.options import Message, Options
from baton.client.sync_client import Client, Stream
from baton.core.errors import BatonError

Write = Callable[[str], None]
Read = Callable[[str], str]

PROMPT = "> "
_HELP = """\
/help               this
/clear              forget what was said
/undo               forget the last question and its answer
/retry              ask the last question again
/system TEXT        tell the model who it is; without TEXT: nothing
/set NAME VALUE     max_tokens, temperature, top_k, top_p or seed; without VALUE: as by default
/stats              how fast the last answer came
/quit               leave, as Ctrl-D does"""
_SETTINGS: Mapping[str, Callable[[str], int | float]] = {
    "max_tokens": int,
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "seed": int,
}


@dataclass
class Conversation:
    """What was said, and how to answer; pure."""

    options: Options
    system: str = ""
    """What the model is told before all else; empty: nothing."""
    said: list[Message] = field(default_factory=list)
    """Questions and answers in turn."""

    def ask(self, question: str) -> list[Message]:
        """Return the chat that has a question at its end; it is not said before `answered`."""
        system = [Message("system", self.system)] if self.system else []
        return [*system, *self.said, Message("user", question)]

    def answered(self, question: str, answer: str) -> None:
        """Note a question and its answer."""
        self.said += [Message("user", question), Message("assistant", answer)]

    def undo(self) -> str:
        """Forget the last question and its answer; return the question, or nothing."""
        if not self.said:
            return ""
        question = self.said[-2].content
        del self.said[-2:]
        return question

    def set(self, name: str, value: str) -> str:
        """Change one setting; return what is to be said about it."""
        kind = _SETTINGS.get(name)
        if kind is None:
            return f"no such setting: {name!r}; there are {', '.join(_SETTINGS)}"
        try:
            number = kind(value) if value else None
        except ValueError:
            return f"{name}: {value!r} is no {'number' if kind is float else 'whole number'}"
        changed: dict[str, Any] = {name: number}
        self.options = replace(self.options, **changed)
        return f"{name}: {'as by default' if number is None else number}"


class Server(Protocol):
    """Who answers: a client over gRPC or HTTP."""

    def chat(self, messages: Sequence[Message], options: Options) -> Stream:
        """See Client.chat."""
        ...

    def models(self) -> dict[str, int]:
        """See Client.models."""
        ...

    def close(self) -> None:
        """See Client.close."""
        ...


class Chat:
    """One session in the terminal."""

    def __init__(self, client: Server, conversation: Conversation, read: Read, write: Write):
        """`read` shows a prompt and returns a line; it raises EOFError at the end."""
        self._client = client
        self._conversation = conversation
        self._read = read
        self._write = write
        self._timing: Timing | None = None

    def run(self) -> None:
        """Talk until the user leaves."""
        while True:
            try:
                line = self._read(PROMPT).strip()
            except KeyboardInterrupt:
                self._write("\n")  # the line that was begun is forgotten
                continue
            except EOFError:
                self._write("\n")
                return
            if line == "/quit":
                return
            if line.startswith("/"):
                self._command(*line[1:].split(maxsplit=1))
            elif line:
                self._answer(line)

    def _command(self, name: str = "", argument: str = "") -> None:
        said = self._conversation
        match name:
            case "clear":
                said.said.clear()
                self._say("forgotten")
            case "undo":
                self._say("forgotten" if said.undo() else "nothing was said yet")
            case "retry":
                if question := said.undo():
                    self._answer(question)
                else:
                    self._say("nothing was said yet")
            case "system":
                said.system = argument
                self._say("so be it" if argument else "no system message")
            case "set":
                setting, _, value = argument.partition(" ")
                self._say(said.set(setting, value.strip()))
            case "stats":
                self._say(_stats(self._timing))
            case "help":
                self._say(_HELP)
            case _:
                self._say(f"no such command: /{name}; /help lists them")

    def _answer(self, question: str) -> None:
        """Show the answer as it comes; after an error the question counts as not asked."""
        parts: list[str] = []
        end = "\n"
        stream = self._client.chat(self._conversation.ask(question), self._conversation.options)
        try:
            for chunk in stream:
                parts.append(chunk.text)
                self._write(chunk.text)
        except KeyboardInterrupt:
            end = "\n(stopped)\n"
        except BatonError as error:
            self._say(f"\nError: {error}")
            return
        finally:
            stream.close()
        self._timing = stream.timing
        self._conversation.answered(question, "".join(parts))
        self._write(end)

    def _say(self, text: str) -> None:
        self._write(text + "\n")


def _stats(timing: Timing | None) -> str:
    if timing is None or timing.ttft_s is None:
        return "nothing was answered yet"
    first = f"first token after {1000 * timing.ttft_s:.0f} ms"
    return first if timing.tpot_s is None else f"{first}, then {1000 * timing.tpot_s:.1f} ms each"


def show(text: str) -> None:
    """Write to stdout at once."""
    print(text, end="", flush=True)


def chat(address: str, tls: ClientTls | None, conversation: Conversation) -> None:
    """Talk to the server until the user leaves; raises what it says to begin with.

    `address` is host:port of its gRPC API, or the URL of its HTTP API.
    """
    with closing(_client(address, tls)) as client:
        models = ", ".join(client.models())  # asked in any case: so it is known who is there
        model = conversation.options.model or models
        show(f"{model} at {address}; /help lists commands, Ctrl-D leaves\n")
        Chat(client, conversation, input, show).run()


def _client(address: str, tls: ClientTls | None) -> Server:
    # Not as an option: everybody on the machine can read a process's arguments.
    key = os.environ.get("BATON_API_KEY", "")
    if not address.startswith(("http://", "https://")):
        return Client(address, api_key=key, tls=tls)
    from baton.client.http import HttpClient  # its library is an extra

    return HttpClient(address, api_key=key, tls=tls)
