"""How the command speaks: progress with elapsed seconds, and errors as one clear sentence."""

import contextlib
import time
from collections.abc import Iterator

import typer
from rich.console import Console

from baton.core.errors import BatonError, InvalidConfig, InvalidRequest

WIDTH = 100
"""Columns that every screen fits in."""


def make_console(*, stderr: bool = False) -> Console:
    """Return a console; where output goes to a file or a pipe, lines are WIDTH long and plain."""
    console = Console(stderr=stderr, highlight=False, soft_wrap=False)
    if not console.is_terminal or console.width > WIDTH:
        console = Console(stderr=stderr, highlight=False, width=WIDTH)
    return console


class Progress:
    """Prints what is going on, with the seconds since it began."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._began = time.monotonic()

    def __call__(self, text: str) -> None:
        """Print one line."""
        elapsed = time.monotonic() - self._began
        self._console.print(f"[dim]{elapsed:6.1f} s[/]  ", end="")
        self._console.print(text, markup=False, soft_wrap=True)


@contextlib.contextmanager
def errors_shown() -> Iterator[None]:
    """Show a BatonError without a traceback, and exit: 2 for bad input, 1 for anything else."""
    try:
        yield
    except BatonError as error:
        make_console(stderr=True).print(
            f"Error: {error}", style="red", markup=False, soft_wrap=True
        )
        bad_input = isinstance(error, InvalidConfig | InvalidRequest)
        raise typer.Exit(2 if bad_input else 1) from None
