"""The commands for a cluster that outlives them."""

from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from baton.cli.console import errors_shown, make_console

_ADDRESS = typer.Option(
    "--address", help="host:port of a Ray cluster's head; by default the one that `up` made."
)


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    for command in (up, status, scale, drain, flip, down, events):
        app.command()(command)


def _run(work: Callable[[Console], Coroutine[Any, Any, None]]) -> None:
    from baton.cli.stopping import Stopping

    with errors_shown():
        console = make_console()
        stopping = Stopping(lambda line: None)
        code = stopping.run(work(console))
    raise typer.Exit(code)


def _run_attached(work: Callable[[Any, Console], Coroutine[Any, Any, None]], address: str) -> None:
    async def run(console: Console) -> None:
        from baton.cli.attached import found_note

        await work(found_note(address), console)

    _run(run)


def up(
    *,
    file: Annotated[Path, typer.Option("-f", "--file", help="The cluster's spec, in YAML.")],
    address: Annotated[str, _ADDRESS] = "",
) -> None:
    """Bring a cluster to what a spec says; start Ray on this machine if there is none."""
    with errors_shown():
        from baton.cluster.spec import load_spec

        spec = load_spec(file)

    async def run(console: Console) -> None:
        from baton.cli.up import up as run_up

        await run_up(spec, address, console)

    _run(run)


def status(
    *,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Until Ctrl-C.")] = False,
    address: Annotated[str, _ADDRESS] = "",
) -> None:
    """Show pools, instances and gateways: who is ready, KV use, requests."""

    async def run(note: Any, console: Console) -> None:
        from baton.cli.status import status as run_status

        await run_status(note, console, watch=watch)

    _run_attached(run, address)


def scale(pool: str, instances: int, *, address: Annotated[str, _ADDRESS] = "") -> None:
    """Ask for so many INSTANCES in POOL; those that are too many are drained."""

    async def run(note: Any, console: Console) -> None:
        from baton.cli.orders import scale as run_scale

        await run_scale(note, pool, instances, console)

    _run_attached(run, address)


def drain(instance: str, *, address: Annotated[str, _ADDRESS] = "") -> None:
    """Let INSTANCE end its requests and leave; its pool is then one fewer."""

    async def run(note: Any, console: Console) -> None:
        from baton.cli.orders import drain as run_drain

        await run_drain(note, instance, console)

    _run_attached(run, address)


def flip(instance: str, *, address: Annotated[str, _ADDRESS] = "") -> None:
    """Drain INSTANCE, and start one of the other role (prefill or decode) in its place."""

    async def run(note: Any, console: Console) -> None:
        from baton.cli.orders import flip as run_flip

        await run_flip(note, instance, console)

    _run_attached(run, address)


def down(*, address: Annotated[str, _ADDRESS] = "") -> None:
    """Drain and end everything that `up` began, and Ray if `up` started it."""

    async def run(note: Any, console: Console) -> None:
        from baton.cli.up import down as run_down

        await run_down(note, console)

    _run_attached(run, address)


def events(
    *,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Until Ctrl-C.")] = False,
    address: Annotated[str, _ADDRESS] = "",
) -> None:
    """Print what was decided and what happened, each with its reason."""

    async def run(note: Any, console: Console) -> None:
        from baton.cli.orders import events as run_events

        await run_events(note, console, follow=follow)

    _run_attached(run, address)
