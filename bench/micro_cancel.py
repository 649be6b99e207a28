"""How long both sides hold a request after its HTTP client has gone.

    python bench/micro_cancel.py --repeat 20

Prefill and decode workers run in this process behind a real gateway; the client closes its
connection while prefill computes, or while decode streams. Prints milliseconds until the gateway,
the decode instance and the prefill instance have given everything back.
"""

import argparse
import asyncio
import statistics
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

import httpx
from rich.console import Console
from rich.table import Table

from baton.api.gateway import Gateway
from baton.api.serve import FrontDoor
from baton.core.config import EngineConfig, GatewayConfig, WorkerConfig
from baton.core.metrics import GatewayMetrics
from baton.core.served_model import FrontModel
from baton.core.topology import Membership, MembershipBoard, Role
from baton.decode_worker.worker import DecodeWorker
from baton.models.tokenizer import load_tokenizer
from baton.prefill_worker.worker import PrefillWorker

DEMO_MODEL = Path(__file__).parents[1] / "demo_model" / "main"
MOMENTS = {
    "while prefill computes": ("x = 1\n" * 700, "prefill"),
    "while decode streams": ("x", ""),
}
PATIENCE_S = 30.0


async def until(holds: Callable[[], bool]) -> None:
    """Wait, to a millisecond, until something holds."""
    async with asyncio.timeout(PATIENCE_S):
        while not holds():  # noqa: ASYNC110 (a meter must not change what it measures)
            await asyncio.sleep(0.001)


async def start(stack: AsyncExitStack) -> tuple[PrefillWorker, DecodeWorker, FrontDoor]:
    """Start a pair and a front door before it."""

    def config(role: Role) -> WorkerConfig:
        return WorkerConfig(
            instance_id=f"{role}-0",
            role=role,
            model_dir=DEMO_MODEL,
            model_name="demo",
            engine=EngineConfig(max_batch_tokens=64),
        )

    def silent(_: str) -> None:
        pass

    prefill = await PrefillWorker.start(config(Role.PREFILL), on_progress=silent)
    await stack.enter_async_context(prefill)
    decode = await DecodeWorker.start(config(Role.DECODE), on_progress=silent)
    await stack.enter_async_context(decode)
    gateway = Gateway(
        GatewayConfig(http_port=0, grpc_port=0),
        {FrontModel(name="demo", expects_prefill=True): load_tokenizer(DEMO_MODEL)},
        MembershipBoard(Membership(1, (prefill.info, decode.info))),
        GatewayMetrics(),
    )
    await gateway.start()
    door = await FrontDoor.start(gateway)
    stack.push_async_callback(door.close)
    return prefill, decode, door


async def measure(repeat: int) -> dict[str, list[float]]:
    """Return milliseconds by moment."""
    found: dict[str, list[float]] = {moment: [] for moment in MOMENTS}
    async with AsyncExitStack() as stack:
        prefill, decode, door = await start(stack)
        for round_ in range(repeat):
            for moment, (prompt, side) in MOMENTS.items():
                body = {"model": "demo", "prompt": prompt, "max_tokens": 900, "seed": round_}
                client = httpx.AsyncClient()
                body |= {"stream": True}
                task = asyncio.create_task(
                    client.post(f"{door.http_url}/v1/completions", json=body)
                )
                if side:
                    await until(lambda: prefill.stats()["sessions"] == 1)
                else:
                    await until(
                        lambda: decode.stats()["running"] == 1 and prefill.stats()["sessions"] == 0
                    )
                task.cancel()
                await asyncio.wait([task])
                gone = time.perf_counter()
                await until(
                    lambda: (
                        not (
                            decode.stats()["open_requests"]
                            or prefill.stats()["sessions"]
                            or decode.stats()["blocks_used"]
                            or prefill.stats()["blocks_used"]
                            or door.gateway.stats().open_requests
                        )
                    )
                )
                found[moment].append((time.perf_counter() - gone) * 1e3)
                await client.aclose()
    return found


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeat", type=int, default=20)
    found = asyncio.run(measure(parser.parse_args().repeat))
    table = Table("the client goes away", "median ms", "min", "max")
    for moment, values in found.items():
        table.add_row(
            moment,
            *(f"{f(values):.1f}" for f in (statistics.median, min, max)),
        )
    Console().print(table)


if __name__ == "__main__":
    main()
