"""Shows texts while they stream: panels on a terminal, prefixed lines anywhere else."""

from collections.abc import Sequence
from typing import Protocol

from rich.columns import Columns
from rich.console import Console, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from baton.cli.demo.record import Record

COLOURS = ("cyan", "green", "yellow", "magenta", "blue")
_PANEL_WIDTH = 49
_PANEL_LINES = 9


class Screen(Protocol):
    """Where the texts of all requests appear."""

    def __enter__(self) -> "Screen": ...
    def __exit__(self, *error: object) -> None: ...
    def text(self, index: int, text: str) -> None:
        """Show more of a request's text."""
        ...

    def ended(self, index: int) -> None:
        """A request is complete."""
        ...


def make_screen(console: Console, records: Sequence[Record]) -> Screen:
    """Return the screen that suits where the output goes."""
    return Panels(console, records) if console.is_terminal else Lines(console, records)


class Panels:
    """A panel per request, side by side; the last lines of each text are seen."""

    def __init__(self, console: Console, records: Sequence[Record]) -> None:
        self._records = records
        self._ended: set[int] = set()
        rows = -(-len(records) // 2)
        self._lines = max(3, min(_PANEL_LINES, (console.height - 2) // rows - 2))
        self._live = Live(
            console=console, refresh_per_second=15, get_renderable=self.get_renderable
        )

    def __enter__(self) -> "Panels":
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def text(self, index: int, text: str) -> None:
        """The record has the text already; the next refresh draws it."""

    def ended(self, index: int) -> None:
        """Mark its panel."""
        self._ended.add(index)

    def get_renderable(self) -> RenderableType:
        """Return all panels as they are now."""
        panels = (self._panel(i, record) for i, record in enumerate(self._records))
        return Columns(panels, width=_PANEL_WIDTH, padding=(0, 1))

    def _panel(self, index: int, record: Record) -> Panel:
        body = Text(record.prompt.shown, style="dim") + Text(record.text)
        lines = body.wrap(Console(width=_PANEL_WIDTH - 4), _PANEL_WIDTH - 4)
        state = "done" if index in self._ended else "streaming" if record.text else "waiting"
        return Panel(
            Text("\n").join(lines[-self._lines :]),
            title=heading(index, record),
            title_align="left",
            subtitle=state,
            subtitle_align="right",
            border_style=COLOURS[index % len(COLOURS)],
            height=self._lines + 2,
            width=_PANEL_WIDTH,
        )


class Lines:
    """Each complete line of each text, with the number of its request in front."""

    def __init__(self, console: Console, records: Sequence[Record]) -> None:
        self._console = console
        self._pending = [record.prompt.shown for record in records]
        self._records = records

    def __enter__(self) -> "Lines":
        for index, record in enumerate(self._records):
            self._print(index, f"── {heading(index, record)}")
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def text(self, index: int, text: str) -> None:
        """Print the lines that are complete now."""
        *whole, self._pending[index] = (self._pending[index] + text).split("\n")
        for line in whole:
            self._print(index, line)

    def ended(self, index: int) -> None:
        """Print what is left."""
        self._print(index, self._pending[index])

    def _print(self, index: int, line: str) -> None:
        self._console.print(f"  {index + 1} │ {line}", markup=False)


def heading(index: int, record: Record) -> str:
    """Return a request's number and name."""
    way = "gRPC" if record.prompt.by_grpc else "HTTP"
    return f"{index + 1} {record.prompt.title} ({way})"
