"""`baton scale`, `drain`, `flip` and `events`: what is asked of a cluster that is up."""

import contextlib
from datetime import datetime

from rich.console import Console

from baton.cli.attached import attached
from baton.cluster.lasting_head import Note

_POLL_S = 20.0


async def scale(note: Note, pool: str, count: int, console: Console) -> None:
    """Ask for so many instances in a pool."""
    async with attached(note) as cluster:
        if await cluster.call("scale", pool, count):
            console.print(f"{pool}: {count} instances are wanted now")
        else:
            console.print(f"nothing changes: {count} instances were wanted in {pool} already")


async def drain(note: Note, instance: str, console: Console) -> None:
    """Ask an instance to leave."""
    async with attached(note) as cluster:
        await cluster.call("drain", instance)
        console.print(f"{instance} takes no more requests, ends those that are open, and leaves")


async def flip(note: Note, instance: str, console: Console) -> None:
    """Ask for the other role in an instance's place."""
    async with attached(note) as cluster:
        await cluster.call("flip", instance)
        console.print(f"{instance} leaves as `drain` does; the other role takes its place")


async def events(note: Note, console: Console, *, follow: bool) -> None:
    """Print the journal; with `follow`, also what comes, until Ctrl-C."""
    wait_s = _POLL_S if follow else 0.0
    async with (
        attached(note) as cluster,
        contextlib.aclosing(cluster.events(0, wait_s)) as batches,
    ):
        async for found, _ in batches:
            for event in found:
                at = datetime.fromtimestamp(event.at).astimezone().strftime("%H:%M:%S")
                text = f"{at}  {event.what:<8} {event.whom:<12} {event.reason}"
                console.print(text, markup=False, soft_wrap=True)
            if not follow:
                return
