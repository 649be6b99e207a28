"""How much of a handover's transfer compute does not hide, by length of the prompt.

    python bench/handover.py --lengths 512 1024 2048 4096 --repeat 10

One prefill and one decode process serve one prompt at a time; every prompt is new, so that nothing
is cached. The figures are those that each request's trace tells: exposed is the time of reads and
checks after the last offer, which the user waits for.
"""

import argparse
import asyncio
import random
import statistics
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table
from run import serving

SERVE = ("--prefill", "1", "--decode", "1", "--local-prefill", "fallback")
PATIENCE_S = 60.0


async def trace_of(client: httpx.AsyncClient, length: int, draw: random.Random) -> dict[str, Any]:
    """Serve one prompt of random tokens; return the trace of its handover."""
    prompt = [draw.randrange(5, 4000) for _ in range(length)]
    body = {"model": "baton-demo", "prompt": prompt, "max_tokens": 2, "temperature": 0}
    answer = (await client.post("/v1/completions", json=body)).raise_for_status()
    request_id = answer.json()["id"]
    trace = (await client.get(f"/v1/requests/{request_id}")).raise_for_status().json()
    [handover] = trace["handovers"]
    assert handover["outcome"] == "ok", trace
    return {**handover, "ttft_s": trace["ttft_s"]}


async def measure(options: argparse.Namespace) -> dict[int, list[dict[str, Any]]]:
    """Return the traces by length; lengths take turns, so that all meet the same machine."""
    draw = random.Random(options.seed)
    found: dict[int, list[dict[str, Any]]] = {length: [] for length in options.lengths}
    async with (
        serving("one pair", SERVE) as url,
        httpx.AsyncClient(base_url=url, timeout=PATIENCE_S, trust_env=False) as client,
    ):
        await trace_of(client, max(options.lengths), draw)  # connections, first pages
        for _ in range(options.repeat):
            for length, traces in found.items():
                traces.append(await trace_of(client, length, draw))
    return found


def table(found: dict[int, list[dict[str, Any]]]) -> Table:
    """Return medians, and the share of exposed time with its spread."""
    rows = Table(
        "prompt", "TTFT ms", "compute ms", "transfer ms", "exposed ms", "exposed, % of compute"
    )
    for length, traces in found.items():
        cells = [
            f"{statistics.median(t[name] for t in traces) * 1e3:.1f}"
            for name in ("ttft_s", "compute_s", "transfer_s", "exposed_s")
        ]
        shares = [100 * t["exposed_s"] / t["compute_s"] for t in traces]
        share = f"{statistics.median(shares):.1f} ({min(shares):.1f}-{max(shares):.1f})"
        rows.add_row(str(length), *cells, share)
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512, 1024, 2048, 4000])
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    found = asyncio.run(measure(parser.parse_args()))
    Console(width=120).print(table(found))


if __name__ == "__main__":
    main()
