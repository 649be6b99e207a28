"""`baton status`: who is there and how they are, as tables."""

import asyncio

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from baton.cli.attached import attached
from baton.cluster.lasting_head import Note
from baton.cluster.status import InstanceStatus, Status

_EVERY_S = 1.0


async def status(note: Note, console: Console, *, watch: bool) -> None:
    """Show the tables once, or again every second until Ctrl-C."""
    async with attached(note) as cluster:
        found: Status = await cluster.call("status")
        if not watch:
            print_status(found, console)
            return
        with Live(tables(found), console=console, auto_refresh=False) as live:
            while True:
                live.update(tables(await cluster.call("status")), refresh=True)
                await asyncio.sleep(_EVERY_S)


def print_status(found: Status, console: Console) -> None:
    """Print the tables."""
    console.print(tables(found))


def tables(found: Status) -> RenderableType:
    """Return what is shown."""
    settled = "everything is as wanted" if found.settled else "not yet as wanted"
    line = f"controller pid {found.controller_pid}, epoch {found.epoch}: {settled}"
    return Group(*_models(found), _instances(found), _gateways(found), line)


def _models(found: Status) -> list[Table]:
    """Return which pools serve which model; nothing if there is one model."""
    pools: dict[str, list[str]] = {}
    for pool in found.pools:
        pools.setdefault(pool.model, []).append(pool.name)
    if len(pools) < 2:
        return []
    table = Table("model", "pools", box=None, pad_edge=False, header_style="bold")
    for model, names in pools.items():
        table.add_row(escape(model), ", ".join(names))
    return [table]


def _instances(found: Status) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("pool", "instance", "phase", "ranks", "pid", "address", "incarnation"):
        table.add_column(name, no_wrap=True)
    for name in ("KV", "runs", "waits"):
        table.add_column(name, justify="right", no_wrap=True)
    for pool in found.pools:
        ready = sum(i.phase == "ready" for i in pool.instances)
        title = f"{pool.name} {ready}/{pool.wanted}"
        for instance in pool.instances or (None,):
            table.add_row(title, *(_cells(instance) if instance else ()))
            title = ""
    return table


def _cells(instance: InstanceStatus) -> tuple[str, ...]:
    used = "" if instance.kv_used is None else f"{instance.kv_used:.0%}"
    return (
        instance.name,
        instance.phase,
        str(instance.ranks),
        _text(instance.pid),
        instance.address,
        "" if instance.incarnation is None else f"{instance.incarnation:016x}",
        used,
        _text(instance.running),
        _text(instance.waiting),
    )


def _text(value: object) -> str:
    return "" if value is None else str(value)


def _gateways(found: Status) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("gateway", "models", "pid", "HTTP", "gRPC", "open", "epoch"):
        table.add_column(name, no_wrap=name != "HTTP")
    for gateway in found.gateways:
        info = gateway.info
        if info is None:
            table.add_row(gateway.name, "", "", gateway.problem)
        else:
            numbers = str(info.open_requests), str(info.epoch)
            where = f"{info.http_url}/v1", info.grpc_address
            models = escape(", ".join(info.models))
            table.add_row(gateway.name, models, str(info.pid), *where, *numbers)
    return table
