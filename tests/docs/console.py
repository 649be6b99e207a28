"""The commands that the pages tell: fenced `console` blocks, and what stands before them.

<!-- not run: why -->        before a block that no test runs
```console
$ command                    continued after \\ or |, or on lines that are indented
# command                    the same, as root
what it prints               … stands for anything
```
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_BLOCK = re.compile(r"(?:<!-- not run: (?P<why>[^\n]+) -->\n)?```console\n(?P<body>.*?)```", re.S)


@dataclass(slots=True)
class Command:
    """One command, and what it is said to print."""

    text: str
    output: list[str] = field(default_factory=list)

    @property
    def expected(self) -> re.Pattern[str]:
        """What is to be found in its output, in this order."""
        lines = [r"[^\n]*?".join(map(re.escape, line.split("…"))) for line in self.output]
        return re.compile(r"\n(?:[^\n]*\n)*?".join(lines))


@dataclass(slots=True)
class Block:
    """The commands of one fenced block."""

    page: str
    line: int
    why_not: str
    commands: list[Command]


def pages() -> list[str]:
    """Return the paths of the pages that have such blocks; the quick start, which serves, first."""
    paths = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    paths.append(ROOT / "deploy" / "helm" / "baton" / "README.md")
    found = [str(path.relative_to(ROOT)) for path in paths if "```console" in path.read_text()]
    return sorted(found, key=lambda page: page != "docs/quickstart.md")


def blocks(page: str) -> Iterator[Block]:
    """Yield the blocks of a page, in order."""
    text = (ROOT / page).read_text()
    for found in _BLOCK.finditer(text):
        line = text.count("\n", 0, found.start("body"))
        yield Block(page, line, found["why"] or "", list(commands(found["body"])))


def commands(body: str) -> Iterator[Command]:
    """Yield the commands of a block with their output."""
    command: Command | None = None
    for line in body.splitlines():
        if line.startswith(("$ ", "# ")):
            if command is not None:
                yield command
            command = Command(line[2:])
        elif command is not None and not command.output and _goes_on(command.text, line):
            command.text += f"\n{line}"
        elif command is not None:
            command.output.append(line)
        else:
            raise ValueError(f"no command before {line!r}")
    if command is not None:
        yield command


def _goes_on(text: str, line: str) -> bool:
    return text.rstrip().endswith(("\\", "|")) and line.startswith(" ")
