"""Every command on a page is run, or the page says why not; those of Baton are at least parsed."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.main import get_command

from baton.cli.main import app
from tests.docs.console import ROOT, Block, Command, blocks, commands, pages

RUN_TIMEOUT_S = 240
PAGE_TIMEOUT_S = 900
MAY_BE_MISSING = {"curl"}
SHIM = """#!/bin/sh
case " $* " in
*" --address "* | *" --url "*) ;;
*) case "$1" in
    generate | chat) set -- "$@" --address "$BATON_GRPC" ;;
    explain | top) set -- "$@" --url "$BATON_HTTP" ;;
    esac ;;
esac
exec "$BATON_PYTHON" -m baton.cli.main "$@"
"""
"""`baton` of this checkout, which asks the test's server where a page asks the one at 8000."""


def all_blocks() -> list[Block]:
    return [block for page in pages() for block in blocks(page)]


def serves(block: Block) -> bool:
    return not block.why_not and block.commands[0].text.startswith("baton serve")


@dataclass(frozen=True)
class Shell:
    """Where commands run: a folder and an environment of their own."""

    folder: Path
    environment: dict[str, str]

    def run(self, block: Block) -> None:
        """Run a block in one shell; each command must succeed and print what the page says."""
        programs = {word for c in block.commands for word in re.findall(r"\b(curl)\b", c.text)}
        if any(shutil.which(program) is None for program in programs & MAY_BE_MISSING):
            return
        script = "\n".join(f"{self.here(c.text)}\nprintf '\\f\\n'" for c in block.commands)
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            capture_output=True, text=True, timeout=RUN_TIMEOUT_S, stdin=subprocess.DEVNULL,
            cwd=self.folder, env=self.environment,
        )  # fmt: skip
        where = f"{block.page}:{block.line}"
        assert done.returncode == 0, f"{where}\n{done.stdout}\n{done.stderr}"
        for command, said in zip(block.commands, done.stdout.split("\f\n"), strict=False):
            assert command.expected.search(said), f"{where}\n{command.text}\n{said}\n{done.stderr}"

    def here(self, text: str) -> str:
        """Return a command with the addresses of the test's server."""
        text = text.replace(".venv/bin/", "").replace("http://127.0.0.1:8000", "$BATON_HTTP")
        return text.replace("127.0.0.1:8001", "$BATON_GRPC")


@pytest.fixture(scope="module")
def shell() -> Iterator[Shell]:
    """Start the server as the quick start says, at ports of its own."""
    [said] = [block.commands[0] for block in all_blocks() if serves(block)]
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="b-") as name:
        folder = Path(name)
        (folder / "bin").mkdir()
        shim = folder / "bin" / "baton"
        shim.write_text(SHIM)
        shim.chmod(0o755)
        environment = os.environ | {
            "PATH": f"{shim.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "BATON_PYTHON": sys.executable,
            "TMPDIR": name,
            "no_proxy": "127.0.0.1",
            "COLUMNS": "120",
        }
        arguments = shlex.split(said.text)[1:]
        server = subprocess.Popen(
            [shim, *arguments, "--port", "0", "--grpc-port", "0", "--kv-memory-mib", "16"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        )  # fmt: skip
        try:
            lines = started(server, said)
            http = re.findall(r"HTTP API +(http://\S+)/v1", lines)[0]
            grpc = re.findall(r"gRPC API +(\S+)", lines)[0]
            yield Shell(folder, environment | {"BATON_HTTP": http, "BATON_GRPC": grpc})
        finally:
            server.send_signal(signal.SIGTERM)
            server.communicate(timeout=RUN_TIMEOUT_S)


def started(server: subprocess.Popen[str], said: Command) -> str:
    """Return what it printed until it was ready, which is what the page says."""
    assert server.stdout is not None
    lines = ""
    for line in server.stdout:
        lines += line
        if "Ctrl-C stops everything" in line:
            assert said.expected.search(lines), lines
            return lines
    raise AssertionError(f"it ended:\n{lines}")


@pytest.mark.timeout(PAGE_TIMEOUT_S)
@pytest.mark.parametrize("page", [p for p in pages() if any(not b.why_not for b in blocks(p))])
def test_what_the_page_tells_works(shell: Shell, page: str) -> None:
    for block in blocks(page):
        if not block.why_not and not serves(block):
            shell.run(block)


def test_what_is_not_run_says_why_and_is_a_command_of_baton_all_the_same() -> None:
    known = get_command(app)
    seen = 0
    for block in all_blocks():
        assert len(block.why_not) > 10 or not block.why_not
        for command in block.commands if block.why_not else ():
            for line in re.sub(r"\\\n", "", command.text).splitlines():
                found = re.search(r"(?:^|[ /])baton ([a-z].*)", line.partition("   #")[0])
                if found and not re.match(r"(deploy|baton)/", found[1]):
                    parsed(known, shlex.split(found[1].rstrip("'")))
                    seen += 1
    assert seen > 5


def parsed(command: object, arguments: list[str]) -> None:
    """Raise for a command or an option that Baton does not have."""
    name, *rest = arguments
    own = command.commands[name]  # type: ignore[attr-defined]
    if hasattr(own, "commands"):
        parsed(own, rest)
    else:
        own.make_context(name, rest)


def test_a_block_is_read_as_it_is_written() -> None:
    [first, second] = commands("$ a |\n    b \\\n   c\nsaid … done\n  more\n# d\n")
    assert first.text == "a |\n    b \\\n   c"
    assert first.expected.search("before\nsaid this done\nother\n  more\nafter")
    assert not first.expected.search("said this\ndone\n  more")
    assert (second.text, second.output) == ("d", [])
    with pytest.raises(ValueError, match="no command before"):
        list(commands("said\n"))
