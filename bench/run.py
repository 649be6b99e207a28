"""Compare ways to serve, side by side: the same load on each in turn, several rounds.

    python bench/run.py                     1 prefill + 1 decode, with every prompt
                                            handed over or with decode free to compute
                                            it itself, against 2 mixed instances
    python bench/run.py --rounds 5 --rate 2

Every round puts the same load on each system, one after the other, while the others idle, so that
what else the machine does hits all of them alike. What counts is the ratio within a round.
"""

import argparse
import asyncio
import json
import shlex
import signal
import socket
import statistics
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from load import add_options, report_of, run
from report import Report, table

SYSTEMS = {
    "disaggregated": ("--prefill", "1", "--decode", "1", "--local-prefill", "fallback"),
    "adaptive": ("--prefill", "1", "--decode", "1", "--local-prefill", "auto"),
    "mixed": ("--prefill", "0", "--decode", "2"),
}
"""All have two instances of one thread each; ratios are to the last one."""
START_TIMEOUT_S = 240.0
STOP_TIMEOUT_S = 60.0


@asynccontextmanager
async def serving(name: str, arguments: tuple[str, ...]) -> AsyncIterator[str]:
    """Run `baton serve`, yield its URL once it is ready, and stop it."""
    port = free_port()
    command = [sys.executable, "-m", "baton.cli.main", "serve", *arguments]
    command += ["--port", str(port), "--grpc-port", "0"]
    print(f"starting {name}: {shlex.join(command[1:])}", flush=True)
    process = await asyncio.create_subprocess_exec(
        *command,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
    )
    assert process.stdout is not None
    lines: list[str] = []
    drain: asyncio.Task[None] | None = None
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            await read_until_ready(process.stdout, lines)
        drain = asyncio.create_task(read_to_the_end(process.stdout))
        yield f"http://127.0.0.1:{port}"
    finally:
        await stop(process)
        if drain is not None:
            await drain


async def read_until_ready(output: asyncio.StreamReader, lines: list[str]) -> None:
    """Return when the server says that it is ready; it exits otherwise."""
    async for raw in output:
        lines.append(raw.decode(errors="replace"))
        if lines[-1].startswith("Ready"):
            return
    raise SystemExit("baton serve did not start:\n" + "".join(lines))


async def read_to_the_end(output: asyncio.StreamReader) -> None:
    """Keep the pipe empty, so that the server never waits for it."""
    while await output.read(1 << 16):
        pass


async def stop(process: asyncio.subprocess.Process) -> None:
    """Ask the server to stop, and kill it if it does not."""
    if process.returncode is None:
        process.send_signal(signal.SIGINT)
    try:
        async with asyncio.timeout(STOP_TIMEOUT_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


def free_port() -> int:
    """Return a port that is free now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


async def compare(options: argparse.Namespace) -> dict[str, list[Report]]:
    """Return the reports of every round by system."""
    reports: dict[str, list[Report]] = {name: [] for name in SYSTEMS}
    async with AsyncExitStack() as stack:
        urls = {}
        for name, arguments in SYSTEMS.items():
            urls[name] = await stack.enter_async_context(serving(name, arguments))
        for number in range(options.rounds):
            for name, url in urls.items():
                report = report_of(await run(url, options), options)
                reports[name].append(report)
                print(f"\nround {number + 1}, {name}\n{table(report)}", flush=True)
    return reports


def figures(report: Report) -> dict[str, float]:
    """Return what is compared."""
    found = {
        "output tokens/s": report.output_tokens_per_s,
        "goodput/s": report.goodput_per_s,
    }
    for name, row in (("TTFT", report.ttft_ms), ("TPOT", report.tpot_ms), ("ITL", report.itl_ms)):
        if row is not None:
            found |= {f"{name} p50 ms": row.p50, f"{name} p99 ms": row.p99}
    return found


def ratios(reports: dict[str, list[Report]]) -> str:
    """Return a table of the median figures, and of the ratio with its spread over the rounds."""
    names = list(reports)
    base = names[-1]
    rounds = {name: [figures(report) for report in reports[name]] for name in names}
    heads = [f"{name:>16}" for name in names] + [f"{name + ' ratio':>26}" for name in names[:-1]]
    lines = [f"{'median of rounds':18}" + "".join(heads)]
    shared = set.intersection(*(set(row) for rows in rounds.values() for row in rows))
    for figure in figures(reports[base][0]):
        if figure not in shared:
            continue
        medians = [statistics.median(row[figure] for row in rounds[name]) for name in names]
        cells = "".join(f"{value:16.1f}" for value in medians)
        for name in names[:-1]:
            cells += f"{spread(rounds[name], rounds[base], figure):>26}"
        lines.append(f"{figure:18}{cells}")
    return "\n".join(lines)


def spread(ours: list[dict[str, float]], base: list[dict[str, float]], figure: str) -> str:
    """Return the median ratio of a figure within a round, and its range."""
    found = [a[figure] / b[figure] for a, b in zip(ours, base, strict=True) if b[figure]]
    if not found:
        return "-"
    return f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})"


def main() -> None:
    """Compare, print, and write all figures as JSON if asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write all figures here")
    add_options(parser)
    options = parser.parse_args()
    reports = asyncio.run(compare(options))
    print(f"\n{ratios(reports)}")
    if options.json is not None:
        rows = {name: [report.as_dict() for report in found] for name, found in reports.items()}
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
