"""Put load on an OpenAI-compatible server and report TTFT, TPOT, ITL, throughput and goodput.

python bench/load.py --requests 100 --rate 4           Poisson arrivals, 4 a second
python bench/load.py --requests 100 --concurrency 8    closed loop, 8 at a time
python bench/load.py --trace trace.csv --rate 4        lengths of a public trace
"""

import argparse
import asyncio
import json
from pathlib import Path
from time import perf_counter

import httpx
from measure import Outcome, measure
from report import Report, summarise, table
from workload import Job, Lengths, drawn, jobs, replayed


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what the load is."""
    parser.add_argument("--requests", type=int, default=64, help="how many")
    parser.add_argument("--warmup", type=int, default=4, help="requests before, not counted")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--rate", type=float, help="arrivals per second (Poisson)")
    how.add_argument("--concurrency", type=int, default=8, help="at a time (closed loop)")
    parser.add_argument("--trace", type=Path, help="CSV or JSONL with lengths")
    for name, median, low, high in (("input", 128, 4, 1024), ("output", 32, 1, 256)):
        parser.add_argument(f"--{name}-median", type=int, default=median, help="tokens")
        parser.add_argument(f"--{name}-sigma", type=float, default=0.8, help="log-normal")
        parser.add_argument(f"--{name}-min", type=int, default=low, help="tokens")
        parser.add_argument(f"--{name}-max", type=int, default=high, help="tokens")
    parser.add_argument("--vocab", type=int, default=4096, help="prompt token ids are below this")
    parser.add_argument("--seed", type=int, default=0, help="of lengths, arrivals and prompts")
    parser.add_argument("--slo-ttft-ms", type=float, default=1000.0)
    parser.add_argument("--slo-tpot-ms", type=float, default=100.0)
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for a request")


def make_jobs(options: argparse.Namespace) -> list[Job]:
    """Return the warm-up jobs and then the counted ones."""
    inputs, outputs = (
        Lengths(
            getattr(options, f"{name}_median"),
            getattr(options, f"{name}_sigma"),
            getattr(options, f"{name}_min"),
            getattr(options, f"{name}_max"),
        )
        for name in ("input", "output")
    )
    if options.trace is None:
        pairs = drawn(options.requests, inputs, outputs, options.seed)
    else:
        pairs = replayed(options.trace, options.requests, inputs, outputs)
    return jobs(pairs, options.rate, options.seed)


async def run(url: str, options: argparse.Namespace) -> list[Outcome]:
    """Run the load against the server at `url`, and return all outcomes but those of warm-up."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=256)
    timeout = httpx.Timeout(options.timeout)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=timeout) as client:
        models = (await client.get("/v1/models")).raise_for_status().json()
        model = models["data"][0]["id"]
        todo = make_jobs(options)
        for index in range(options.warmup):
            job = Job(-1 - index, 0.0, todo[0].input_length, 4)
            await measure(client, model, job, job.prompt(options.vocab, options.seed), 0.0)
        if options.rate is None:
            return await _closed_loop(client, model, todo, options)
        return await _open_loop(client, model, todo, options)


async def _open_loop(
    client: httpx.AsyncClient, model: str, todo: list[Job], options: argparse.Namespace
) -> list[Outcome]:
    """Send each job when it is due, whatever became of those before it."""
    begin = perf_counter()

    async def one(job: Job) -> Outcome:
        prompt = job.prompt(options.vocab, options.seed)
        await asyncio.sleep(max(begin + job.at - perf_counter(), 0))
        return await measure(client, model, job, prompt, begin + job.at)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(job)) for job in todo]
    return [task.result() for task in tasks]


async def _closed_loop(
    client: httpx.AsyncClient, model: str, todo: list[Job], options: argparse.Namespace
) -> list[Outcome]:
    """Keep `concurrency` jobs open: each user sends the next one when its last has ended."""
    left = iter(todo)
    outcomes: list[Outcome] = []

    async def user() -> None:
        for job in left:
            prompt = job.prompt(options.vocab, options.seed)
            outcomes.append(await measure(client, model, job, prompt, perf_counter()))

    async with asyncio.TaskGroup() as group:
        for _ in range(options.concurrency):
            group.create_task(user())
    return outcomes


def report_of(outcomes: list[Outcome], options: argparse.Namespace) -> Report:
    """Return the figures against the SLOs of `options`."""
    return summarise(outcomes, options.slo_ttft_ms, options.slo_tpot_ms)


def main() -> None:
    """Run one load, print the table, and write the figures as JSON if asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="without /v1")
    parser.add_argument("--json", type=Path, help="write the figures here")
    add_options(parser)
    options = parser.parse_args()
    report = report_of(asyncio.run(run(options.url, options)), options)
    print(table(report))
    if options.json is not None:
        options.json.write_text(json.dumps(report.as_dict(), indent=2) + "\n")


if __name__ == "__main__":
    main()
