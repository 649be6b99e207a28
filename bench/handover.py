"""How much of a handover's transfer compute does not hide, by length of the prompt.

    python bench/handover.py --lengths 512 1024 2048 4096 --repeat 10

One prefill and one decode process serve one prompt at a time; every prompt is new, so that nothing
is cached. The figures are those that each request's trace tells: exposed is the time of reads and
checks after the last offer, which the user waits for.

With --digests a second pair, whose handovers have no digests (see unchecked/), serves the same
prompts in turns, and the difference within each turn is what digests cost.
"""

import argparse
import asyncio
import os
import random
import statistics
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table
from run import serving

UNCHECKED = Path(__file__).resolve().parent / "unchecked"
SERVE = ("--prefill", "1", "--decode", "1", "--local-prefill", "fallback")
PATIENCE_S = 60.0


Traces = dict[int, list[dict[str, Any]]]
"""By the length of the prompt, in order."""


@contextmanager
def without_digests() -> Iterator[None]:
    """Have processes that are started meanwhile hand over without digests."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(UNCHECKED), before)))
    try:
        yield
    finally:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before


async def trace_of(client: httpx.AsyncClient, prompt: list[int]) -> dict[str, Any]:
    """Serve one prompt; return the trace of its handover."""
    body = {"model": "baton-demo", "prompt": prompt, "max_tokens": 2, "temperature": 0}
    answer = (await client.post("/v1/completions", json=body)).raise_for_status()
    request_id = answer.json()["id"]
    trace = (await client.get(f"/v1/requests/{request_id}")).raise_for_status().json()
    [handover] = trace["handovers"]
    assert handover["outcome"] == "ok", trace
    return {**handover, "ttft_s": trace["ttft_s"]}


async def measure(options: argparse.Namespace) -> list[Traces]:
    """Return the traces of each pair; lengths and pairs take turns, on the same machine."""
    draw = random.Random(options.seed)
    found: list[Traces] = []
    async with AsyncExitStack() as stack:
        clients = []
        for digests in (True, False)[: 1 + options.digests]:
            with nullcontext() if digests else without_digests():
                name = "one pair" if digests else "one pair without digests"
                url = await stack.enter_async_context(serving(name, SERVE))
            client = httpx.AsyncClient(base_url=url, timeout=PATIENCE_S, trust_env=False)
            clients.append(await stack.enter_async_context(client))
            found.append({length: [] for length in options.lengths})
        for turn in range(-1, options.repeat):
            for length in options.lengths:
                prompt = [draw.randrange(5, 4000) for _ in range(length)]
                for pair in sorted(range(len(clients)), reverse=bool(turn % 2)):
                    trace = await trace_of(clients[pair], prompt)
                    if turn >= 0:  # the first made connections and touched pages
                        found[pair][length].append(trace)
    return found


def table(found: Traces) -> Table:
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


def comparison(checked: Traces, unchecked: Traces) -> Table:
    """Return what digests add: medians of the differences, and those as shares of the medians."""
    rows = Table("prompt", "TTFT", "of it", "transfer", "of it", "exposed", "of it", "of TTFT")
    for length, traces in checked.items():
        cells = [str(length)]
        ttft = statistics.median(trace["ttft_s"] for trace in unchecked[length])
        for name in ("ttft_s", "transfer_s", "exposed_s"):
            pairs = zip(traces, unchecked[length], strict=True)
            added = statistics.median(one[name] - other[name] for one, other in pairs)
            whole = statistics.median(trace[name] for trace in unchecked[length])
            cells += [f"{added * 1e3:+.2f} of {whole * 1e3:.2f} ms", f"{added / whole:+.1%}"]
        rows.add_row(*cells, f"{added / ttft:+.1%}")
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512, 1024, 2048, 4000])
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--digests", action="store_true", help="compare with a pair without them")
    found = asyncio.run(measure(parser.parse_args()))
    console = Console(width=140)
    console.print(table(found[0]))
    if len(found) > 1:
        console.print(table(found[1]))
        console.print(comparison(*found))


if __name__ == "__main__":
    main()
