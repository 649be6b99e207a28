"""A gateway and a client in one process of a node, told what to do by lines of JSON; not a test.

test ── {"id": 1, "do": "ask", …}, {"id": 2, "do": "generate", …} ──▶ agent
test ◀─ {"id": 1, "result": …} or {"id": 1, "error": …}, {"id": 2, "tokens": 5} as they come

The gateway is the one that `baton up` starts as an actor, with the controller's membership; here
the test knows on which node it is.
"""

import asyncio
import json
import sys
import time
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc

from baton.cli.attached import Attached, attached
from baton.cluster import ray_calls
from baton.cluster.gateway_host import GatewayHost
from baton.cluster.lasting_head import Note
from baton.cluster.names import CONTROLLER
from baton.cluster.status import GatewayPlan
from baton.core import log
from baton.core.config import GatewayConfig
from baton.core.errors import BatonError, Overloaded, Unavailable
from baton.core.served_model import FrontModel
from baton.proto import inference_pb2 as pb
from baton.proto.errors import from_rpc_error
from baton.proto.inference_pb2_grpc import InferenceStub

_REQUEST_S = 240.0
_ASK_S = 90.0
_PAUSE_S = 0.1
_MOST_LOSSES = 16
"""More decode instances than one request can lose in a run, on a busy machine too."""
_DIRECT = (("grpc.enable_http_proxy", 0),)


class Agent:
    """Does what it is told, each thing in a task of its own."""

    def __init__(self, cluster: Attached, host: GatewayHost) -> None:
        self._cluster = cluster
        self._host = host

    async def do(self, order: dict[str, Any]) -> Any:
        """Carry out one order; return what is to be told of it."""
        match order["do"]:
            case "ask":
                return await self._ask(order["method"], order["arguments"])
            case "generate":
                return await self._generate(order)
            case "nodes":
                return [node.address for node in await ray_calls.nodes(10.0)]
            case _:
                return await self._gateway()

    async def _ask(self, method: str, arguments: list[Any]) -> Any:
        """Ask the controller, whichever process it is; it may be away for a while."""
        async with asyncio.timeout(_ASK_S):
            while True:
                try:
                    actor = await ray_calls.find_actor(CONTROLLER, 10.0)
                    return await ray_calls.call(actor, "ask", method, *arguments, timeout_s=30.0)
                except BatonError as error:
                    if error.code not in ("instance_lost", "unavailable", "deadline_exceeded"):
                        raise
                    await asyncio.sleep(_PAUSE_S)

    async def _generate(self, order: dict[str, Any]) -> dict[str, Any]:
        """Stream one request to its end, as a client does that asks again when it is refused."""
        refused = 0
        async with asyncio.timeout(_REQUEST_S):
            while True:
                try:
                    return {**await self._stream(order), "refused": refused}
                except (Overloaded, Unavailable):
                    refused += 1
                    await asyncio.sleep(_PAUSE_S)

    async def _stream(self, order: dict[str, Any]) -> dict[str, Any]:
        tokens: list[int] = []
        times = [time.time()]
        request_id, finish = "", ""
        info = await self._host.info()
        request = pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=order["prompt"]),
            max_tokens=order["max_tokens"],
            temperature=order["temperature"],
            seed=order["seed"],
            ignore_eos=True,
        )
        async with grpc.aio.insecure_channel(info.grpc_address, options=_DIRECT) as channel:
            try:
                async for response in InferenceStub(channel).Generate(request):
                    tokens += response.token_ids
                    times.append(time.time())
                    request_id, finish = response.request_id, response.finish_reason
                    tell({"id": order["id"], "tokens": len(tokens)})
            except grpc.aio.AioRpcError as error:
                raise (from_rpc_error(error) if not tokens else _Broken(tokens, error)) from None
        return {
            "tokens": tokens,
            "finish": finish,
            "gap_s": max(b - a for a, b in pairwise(times)),
            "moved": self._moved(request_id),
        }

    def _moved(self, request_id: str) -> int:
        door = self._host.door
        trace = door.gateway.trace(request_id) if door else None
        return len(trace.migrations) if trace else 0

    async def _gateway(self) -> dict[str, Any]:
        """Return what the gateway holds; it is checked if that is nothing."""
        door = self._host.door
        assert door is not None, "no gateway"
        stats = door.gateway.stats()
        if not stats.open_requests:
            door.gateway.check()
        return {"open_requests": stats.open_requests, "epoch": (await self._host.info()).epoch}


class _Broken(BatonError):
    """A stream that the gateway broke off after tokens had come."""

    code = "internal"

    def __init__(self, tokens: list[int], error: grpc.aio.AioRpcError) -> None:
        super().__init__(f"broken off after {len(tokens)} tokens: {error.details()}")


def tell(message: dict[str, Any]) -> None:
    """Send one line to the test."""
    sys.stdout.write(json.dumps(message, default=str) + "\n")
    sys.stdout.flush()


async def _carry_out(agent: Agent, order: dict[str, Any]) -> None:
    try:
        result = await agent.do(order)
    except Exception as error:
        tell({"id": order["id"], "error": f"{type(error).__name__}: {error}"})
        return
    tell({"id": order["id"], "result": _plain(result)})


def _plain(value: Any) -> Any:
    if hasattr(value, "__dataclass_fields__"):
        return asdict(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


async def main(address: str, name: str, model_name: str, model_dir: str) -> None:
    """Serve until standard input ends."""
    plan = GatewayPlan(
        name,
        {FrontModel(name=model_name, expects_prefill=True): Path(model_dir)},
        GatewayConfig(http_port=0, grpc_port=0, max_migrations=_MOST_LOSSES),
    )
    async with attached(Note(address)) as cluster, asyncio.TaskGroup() as group:
        tried = asyncio.Event()
        host = GatewayHost(plan, tried.set)
        serving = group.create_task(host.serve())
        await tried.wait()
        agent = Agent(cluster, host)
        tell({"id": 0, "result": "ready"})
        while line := await asyncio.to_thread(sys.stdin.readline):
            group.create_task(_carry_out(agent, json.loads(line)))
        await host.stop(1.0)
        await serving


if __name__ == "__main__":
    log.configure()
    asyncio.run(main(*sys.argv[1:]))
