"""The demo from start to end."""

import asyncio
import os
import textwrap
import time
from pathlib import Path

from rich.console import Console

from baton.cli.console import WIDTH, Progress
from baton.cli.defaults import DEMO_MODEL, DEMO_NAME
from baton.cli.demo.clients import Users
from baton.cli.demo.prompts import demo_prompts
from baton.cli.demo.record import Record
from baton.cli.demo.screen import Screen, make_screen
from baton.cli.demo.story import print_table, sentences
from baton.cli.demo.timeline import draw
from baton.cli.preflight import check_before_start
from baton.cli.stopping import Stopping
from baton.core.config import ClusterConfig, EngineConfig, GatewayConfig, HandoverConfig
from baton.core.topology import InstanceInfo

BETWEEN_SENDS_S = 0.08
"""Users do not all press Enter in the same millisecond."""
INTRODUCTION = """\
An LLM answers in two phases. [bold]Prefill[/] computes the whole prompt at once and is hungry for
compute; [bold]decode[/] then makes one token after the other and must never be held up.
Baton runs them in separate processes, and hands each prompt's KV cache (what attention remembers
of it) over while it is still being computed. Here a small model does it, live, on this machine."""


def demo_config() -> ClusterConfig:
    """Return what the demo starts: one prefill and one decode instance, on free ports."""
    return ClusterConfig(
        model_dir=DEMO_MODEL,
        model_name=DEMO_NAME,
        # Small steps: the long prompt then takes several chunks, and its handover overlaps.
        engine=EngineConfig(kv_memory_mib=64, max_batch_tokens=256),
        # With nobody else to disturb, decode would compute these short prompts itself.
        handover=HandoverConfig(local_prefill="fallback"),
        gateway=GatewayConfig(http_port=0, grpc_port=0),
    )


async def demo(console: Console, stopping: Stopping) -> None:
    """Start, send, explain, stop; raises BatonError if any request fails."""
    began = time.monotonic()
    say = Progress(console)
    config = demo_config()
    _title(console, "Baton: prefill here, decode there")
    console.print(INTRODUCTION)
    _title(console, "1  Start")
    check_before_start(config)
    say("loading libraries")
    from baton.cli.system import running

    def remember(cluster: object) -> None:
        stopping.hurry = cluster.hurry  # type: ignore[attr-defined]

    async with running(config, say, on_cluster=remember) as system:
        stopping.arm()
        instances = system.cluster.board.current.instances
        pids = system.cluster.processes()
        temp_dir = system.cluster.temp_dir
        _who_is_who(console, instances, system.door.http_url, system.door.grpc_address)
        records = [Record(p) for p in demo_prompts(lambda t: len(system.tokenizer.encode(t)))]
        _title(console, f"2  {len(records)} users ask at the same time")
        await _ask(console, records, system.door.http_url, system.door.grpc_address)
        _explain(console, records, instances)
        _title(console, "4  Stop")
        say("closing gateway, instances and Ray")
    _check_nothing_left(pids, temp_dir)
    say(f"nothing is left: {len(pids)} processes have ended, {temp_dir} is gone")
    console.print(
        f"\nThat took {time.monotonic() - began:.0f} s. Next: make serve, and ask it yourself.\n"
    )


def _check_nothing_left(pids: tuple[int, ...], temp_dir: Path) -> None:
    left = [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    assert not left, f"processes are left: {left}"
    assert not temp_dir.exists(), f"{temp_dir} is left"


async def _ask(console: Console, records: list[Record], http_url: str, grpc_address: str) -> None:
    async with Users(http_url, grpc_address, DEMO_NAME) as users:
        with make_screen(console, records) as screen:
            users.start_clock()
            async with asyncio.TaskGroup() as group:
                for index, record in enumerate(records):
                    group.create_task(_one_user(users, screen, index, record))
                    await asyncio.sleep(BETWEEN_SENDS_S)
        for record in records:
            record.trace = await users.trace(record)


async def _one_user(users: Users, screen: Screen, index: int, record: Record) -> None:
    await users.stream(record, seed=index, on_text=lambda text: screen.text(index, text))
    screen.ended(index)


def _explain(console: Console, records: list[Record], instances: tuple[InstanceInfo, ...]) -> None:
    _title(console, "3  The way each request went")
    draw(console, records)
    console.print()
    print_table(console, records)
    console.print()
    for sentence in sentences(records, instances):
        for line in textwrap.wrap(f"• {sentence}", WIDTH - 2, subsequent_indent="  "):
            console.print(line, markup=False)


def _who_is_who(
    console: Console, instances: tuple[InstanceInfo, ...], http_url: str, grpc_address: str
) -> None:
    console.print()
    for info in instances:
        console.print(
            f"  pid {info.pid:<7} {info.instance_id:<10} {info.address:<16}"
            f" loaded in {info.load_s:.1f} s, KV for {info.kv_tokens:,} tokens"
        )
    console.print(
        f"  pid {os.getpid():<7} gateway    {http_url} (OpenAI API), {grpc_address} (gRPC)"
    )


def _title(console: Console, text: str) -> None:
    console.print()
    console.rule(f"[bold]{text}", align="left", style="dim")
