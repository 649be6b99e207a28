"""`baton up` and `baton down`: bring a cluster to what a spec says, and end it."""

import asyncio
import contextlib
import math
import os
import shutil
import tempfile
from pathlib import Path

from rich.console import Console

from baton.cli.attached import Attached, attached, note_path, with_controller
from baton.cli.console import Progress
from baton.cli.machine import cpu_cores
from baton.cli.preflight import check_port, check_spec
from baton.cli.status import print_status
from baton.cluster import lasting_head, ray_calls
from baton.cluster.lasting_head import Note
from baton.cluster.local_cluster import short_temp_dir
from baton.cluster.placement import cpus_of
from baton.cluster.status import Status
from baton.core.cluster_spec import ClusterSpec
from baton.core.errors import BatonError, DeadlineExceeded, Unavailable

_HEAD_TIMEOUT_S = 90.0
_APPLY_TIMEOUT_S = 120.0
_POLL_S = 5.0
_MARGIN_S = 30.0
_DOWN_MARGIN_S = 90.0


async def up(spec: ClusterSpec, address: str, console: Console) -> None:
    """Attach to Ray, or start it, and return once everything is as the spec says.

    Raises BatonError if that cannot be, or is not so within the spec's start time; what was begun
    goes on then.
    """
    check_spec(spec)
    say = Progress(console)
    note = await _note(spec, address, say)
    async with attached(note) as cluster:
        cluster = await with_controller(cluster, _log_dir(note))
        first = 0
        if await _known(cluster):
            events, _ = await cluster.call("events", 0, 0.0)
            first = events[-1].number if events else 0
        changed = await cluster.call("apply", spec, timeout_s=_APPLY_TIMEOUT_S)
        if not changed:
            say("nothing changes: the cluster is what the spec says")
        await _until_settled(cluster, spec, first, say)
        status: Status = await cluster.call("status")
        print_status(status, console)


async def down(note: Note, console: Console) -> None:
    """Drain and end everything that `up` began; Ray too if we started it."""
    say = Progress(console)
    if note.alive():
        try:
            await _end_all(note, say)
        except BatonError as error:
            if note.guard is None:
                raise  # what runs in another's Ray goes on: not nothing is left
            say(f"not ended in order: {error}")
    if note.guard is not None:
        say("ending Ray")
        await lasting_head.stop(note)
        ray_calls.abandon_calls()
        note_path().unlink(missing_ok=True)
        if note.temp_dir is not None:
            shutil.rmtree(note.temp_dir, ignore_errors=True)
    say("nothing is left")


async def _end_all(note: Note, say: Progress) -> None:
    """Drain and end everything, and the controller; raises if it cannot be."""
    async with attached(note) as cluster:
        if cluster.actor is None:
            say("nothing is up")
            return
        say("draining gateways and instances")
        await cluster.call("down", timeout_s=await _patience_s(cluster))
        await ray_calls.kill(cluster.actor)


async def _note(spec: ClusterSpec, address: str, say: Progress) -> Note:
    """Return how to attach, after starting Ray if there is none."""
    known = Note.read(note_path())
    if address:
        note = known if known is not None and known.address == address else Note(address)
    elif known is not None and known.alive():
        note = known
    else:
        _check_ports(spec)
        note = await _start_ray(spec, say)
    if note != known:
        note.write(note_path())
    return note


async def _start_ray(spec: ClusterSpec, say: Progress) -> Note:
    say("starting Ray")
    slots = spec.cpus or max(math.ceil(cpus_of(spec)) + 1, cpu_cores())
    threads = max(pool.threads for _, pool in spec.pools().values())
    temp_dir = short_temp_dir()
    try:
        note = await lasting_head.start(
            temp_dir, slots=slots, threads=threads, timeout_s=_HEAD_TIMEOUT_S
        )
    except BaseException:
        shutil.rmtree(temp_dir, ignore_errors=True)
        raise
    say(f"Ray is up at {note.address} (pid {note.guard})")
    return note


def _check_ports(spec: ClusterSpec) -> None:
    """Refuse ports in use: a Ray that we start here has all gateways here."""
    doors = {f"models.{i}.gateways": model.gateways for i, model in enumerate(spec.models)}
    for where, door in {"gateways": spec.shared_gateways, **doors}.items():
        if door is None:
            continue
        for number in range(door.count):
            config = door.of(number)
            for name in ("http_port", "grpc_port"):
                check_port(f"{where}.{name}", config.host, getattr(config, name))


def _log_dir(note: Note) -> Path:
    """Return where instances write their logs, on whatever node they run."""
    if note.temp_dir is not None:
        return Path(note.temp_dir) / "instances"
    return Path(tempfile.gettempdir()) / f"baton-{os.getuid()}"


async def _known(cluster: Attached) -> bool:
    try:
        await cluster.call("status")
    except Unavailable:
        return False
    return True


async def _until_settled(cluster: Attached, spec: ClusterSpec, after: int, say: Progress) -> None:
    """Tell what happens until everything is as wanted."""
    limit_s = spec.start_timeout_s + spec.drain_timeout_s + _MARGIN_S
    reasons: dict[str, str] = {}
    try:
        async with (
            asyncio.timeout(limit_s),
            contextlib.aclosing(cluster.events(after, _POLL_S)) as batches,
        ):
            async for events, settled in batches:
                for event in events:
                    say(f"{event.whom}: {event.what} ({event.reason})")
                    if event.what == "lost":
                        reasons[event.whom] = event.reason
                if settled:
                    return
    except TimeoutError:
        text = "; ".join(f"{whom}: {reason}" for whom, reason in reasons.items())
        told = text or "`baton status` and `baton events` tell more"
        raise DeadlineExceeded(f"not everything is ready after {limit_s:g} s: {told}") from None


async def _patience_s(cluster: Attached) -> float:
    try:
        status: Status = await cluster.call("status")
    except BatonError:
        return _DOWN_MARGIN_S
    return status.drain_timeout_s * 2 + _DOWN_MARGIN_S
