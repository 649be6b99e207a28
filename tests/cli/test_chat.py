"""`baton chat` in a process of its own, talking to a real gateway."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator

import pytest

from baton.cli.chat import Conversation
from baton.client.options import Message, Options
from tests.api.conftest import (  # noqa: F401 - fixtures
    board,
    front_door,
    leader,
    make_front_door,
    make_gateway,
    make_leader,
    text_script,
    tokenizer,
    until,
)

SOON = 120
TEXT = "one two three"


class Terminal:
    """A `baton chat` with pipes instead of a keyboard and a screen."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self.process = process
        self._keys = process.stdin
        self._screen = process.stdout

    def type(self, line: str) -> None:
        self._keys.write(f"{line}\n".encode())

    async def shown(self, end: str) -> str:
        """Return what is shown up to some text, and that text."""
        async with asyncio.timeout(SOON):
            return (await self._screen.readuntil(end.encode())).decode()

    async def asks(self, line: str) -> str:
        """Type a line and return what is shown before the next prompt."""
        self.type(line)
        return (await self.shown("\n> ")).removesuffix("> ").strip()


@pytest.fixture
async def terminal(front_door, request) -> AsyncIterator[Terminal]:  # noqa: F811
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "baton.cli.main", "chat",
        "--address", getattr(front_door, getattr(request, "param", "grpc_address")),
        "--model", "demo", "--seed", "1", "--max-tokens", "50",
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    terminal = Terminal(process)
    await terminal.shown("\n> ")
    yield terminal
    if process.returncode is None:
        process.kill()
    await process.wait()


async def test_turns_commands_and_the_end(terminal, leader, text_script, tokenizer):  # noqa: F811
    leader.script = text_script(TEXT)
    assert await terminal.asks("hi") == TEXT
    assert await terminal.asks("and now?") == TEXT
    chat = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": TEXT},
        {"role": "user", "content": "and now?"},
    ]
    second = leader.submits[1].request
    assert list(second.prompt) == tokenizer.apply_chat_template(chat)
    assert (second.seed, second.max_tokens) == (1, 50)
    assert "first token after" in await terminal.asks("/stats")
    assert await terminal.asks("/nonsense") == "no such command: /nonsense; /help lists them"
    assert await terminal.asks("/set top_p 7") == "top_p: 7.0"
    assert "top_p" in await terminal.asks("hi"), "an error, and the program goes on"
    assert await terminal.asks("/set top_p") == "top_p: as by default"
    assert await terminal.asks("/retry") == TEXT
    assert list(leader.submits[2].request.prompt) == list(second.prompt)
    assert await terminal.asks("/clear") == "forgotten"
    assert await terminal.asks("hi") == TEXT
    assert list(leader.submits[3].request.prompt) == tokenizer.apply_chat_template(chat[:1])
    terminal.type("/quit")
    assert await asyncio.wait_for(terminal.process.wait(), SOON) == 0


@pytest.mark.parametrize("terminal", ["grpc_address", "http_url"], indirect=True)
async def test_ctrl_c_stops_the_answer_and_not_the_program(
    terminal,
    front_door,  # noqa: F811
    leader,  # noqa: F811
    text_script,  # noqa: F811
):
    leader.script = text_script(TEXT, hold_after=1)
    terminal.type("hi")
    await terminal.shown("one")
    terminal.process.send_signal(signal.SIGINT)
    assert (await terminal.shown("> ")).strip() == "(stopped)\n>"
    async with asyncio.timeout(SOON):
        await front_door.gateway.idle()
    leader.script = text_script(TEXT)
    assert await terminal.asks("go on") == TEXT
    terminal.process.stdin.write_eof()
    assert await asyncio.wait_for(terminal.process.wait(), SOON) == 0


def test_what_was_said_is_asked_again_and_undone():
    said = Conversation(Options(), system="be brief")
    assert said.ask("a") == [Message("system", "be brief"), Message("user", "a")]
    said.answered("a", "b")
    said.answered("c", "d")
    assert [message.content for message in said.ask("e")] == ["be brief", "a", "b", "c", "d", "e"]
    assert said.undo() == "c"
    assert said.undo() == "a"
    assert said.undo() == ""


def test_settings_are_changed_or_refused_by_name():
    said = Conversation(Options())
    assert said.set("seed", "7") == "seed: 7"
    assert said.options.seed == 7
    assert said.set("seed", "x") == "seed: 'x' is no whole number"
    assert said.set("temperature", "x") == "temperature: 'x' is no number"
    assert said.set("seed", "") == "seed: as by default"
    assert said.options.seed is None
    assert said.set("x", "1").startswith("no such setting: 'x'; there are max_tokens, ")
