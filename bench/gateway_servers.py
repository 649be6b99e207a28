"""The servers of bench/gateway.py, each a process: `bench/gateway_servers.py KIND [ADDRESS]`.

Each prints where it listens, and ends with its standard input.

    instance   a decode instance that answers at once: a token for all open requests, step by step
    gateway    Baton's front door before the instance at ADDRESS
    sse        FastAPI on uvicorn, which sends as many events of the same size: the limit of HTTP
    grpc       grpc.aio, which sends as many messages of the same size: the limit of gRPC
"""

import asyncio
import json
import os
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from baton.api.gateway import Gateway
from baton.api.serve import FrontDoor
from baton.core import log
from baton.core.config import GatewayConfig
from baton.core.ids import Incarnation, InstanceId
from baton.core.metrics import GatewayMetrics
from baton.core.served_model import FrontModel
from baton.core.topology import InstanceInfo, Membership, MembershipBoard, Role
from baton.models.tokenizer import load_tokenizer
from baton.proto import inference_pb2 as public
from baton.proto import inference_pb2_grpc as public_grpc
from baton.proto import worker_pb2 as pb
from baton.proto import worker_pb2_grpc as pb_grpc
from baton.proto.grpc_runtime import WorkerServer

MODEL_DIR = Path(__file__).resolve().parent.parent / "demo_model" / "main"
TOKEN = 300
"""Some token of the demo model that stands for a few letters."""
TEXT = " return"


class Instance(pb_grpc.DecodeServicer):
    """Answers at once, one step for all that is open."""

    async def Session(  # noqa: N802
        self, request_iterator: AsyncIterator[pb.GatewayFrame], context: object
    ) -> AsyncIterator[pb.DecodeFrame]:
        left: dict[int, int] = {}
        arrived = asyncio.Event()

        async def read() -> None:
            async for frame in request_iterator:
                if frame.HasField("submit"):
                    left[frame.submit.key] = frame.submit.request.max_tokens
                    arrived.set()

        reading = asyncio.create_task(read())
        yield pb.DecodeFrame(hello=pb.Hello(instance_id="decode-0", incarnation=1))
        while not reading.done():
            await arrived.wait()
            arrived.clear()
            while step := dict(left):
                for key, n in step.items():
                    if n > 1:
                        left[key] = n - 1
                    else:
                        del left[key]
                yield pb.DecodeFrame(updates=[_update(key, n) for key, n in step.items()])
                await asyncio.sleep(0)  # let new ones in


def _update(key: int, left: int) -> pb.Update:
    finish = pb.Finish(reason="length") if left == 1 else None
    return pb.Update(key=key, tokens=[TOKEN], finish=finish)


async def instance() -> str:
    server = await WorkerServer.start(
        "127.0.0.1", 0, lambda s: pb_grpc.add_DecodeServicer_to_server(Instance(), s)
    )
    _keep.append(server)
    return server.address


async def gateway(address: str) -> str:
    """Print both addresses: HTTP and gRPC."""
    info = InstanceInfo(
        instance_id=InstanceId("decode-0"),
        role=Role.MIXED,
        address=address,
        incarnation=Incarnation(1),
        pid=0,
        model="bench",
        compatibility="",
        max_model_len=4096,
        kv_tokens=1 << 24,
        max_sequences=4096,
        load_s=0.0,
    )
    served = Gateway(
        GatewayConfig(http_port=0, grpc_port=0, max_open_requests=4096),
        {FrontModel(name="bench"): load_tokenizer(MODEL_DIR)},
        MembershipBoard(Membership(1, (info,))),
        GatewayMetrics(),
    )
    await served.start()
    door = await FrontDoor.start(served)
    _keep.append(door)
    return f"{door.http_url.removeprefix('http://')} {door.grpc_address}"


async def sse() -> str:
    app = FastAPI()
    choice = {"index": 0, "text": TEXT, "finish_reason": None, "logprobs": None}
    event = json.dumps(
        {"id": "cmpl-" + "0" * 24, "object": "text_completion", "created": 1_700_000_000}
        | {"model": "bench", "choices": [choice]}
    )
    data = f"data: {event}\n\n".encode()

    @app.post("/v1/completions")
    async def completions(request: Request) -> StreamingResponse:
        body = json.loads(await request.body())

        async def events() -> AsyncIterator[bytes]:
            for _ in range(body["max_tokens"]):
                yield data
                await asyncio.sleep(0)
            yield b"data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    listener = socket.socket(proto=socket.IPPROTO_TCP)  # named, so that asyncio sets TCP_NODELAY
    listener.bind(("127.0.0.1", 0))
    listener.listen(2048)
    config = uvicorn.Config(app, lifespan="off", log_config=None, access_log=False)
    _keep.append(asyncio.create_task(uvicorn.Server(config).serve(sockets=[listener])))
    return f"127.0.0.1:{listener.getsockname()[1]}"


class Bare(public_grpc.InferenceServicer):
    """Sends one message a token."""

    async def Generate(  # noqa: N802
        self, request: public.GenerateRequest, context: object
    ) -> AsyncIterator[public.GenerateResponse]:
        for _ in range(request.max_tokens):
            yield public.GenerateResponse(text=TEXT, token_ids=[TOKEN])
            await asyncio.sleep(0)


async def bare_grpc() -> str:
    server = grpc.aio.server()
    public_grpc.add_InferenceServicer_to_server(Bare(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    _keep.append(server)
    return f"127.0.0.1:{port}"


_keep: list[object] = []
_KINDS = {"instance": instance, "gateway": gateway, "sse": sse, "grpc": bare_grpc}


async def main(kind: str, *arguments: str) -> None:
    log.configure()
    print(await _KINDS[kind](*arguments), flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    os._exit(0)  # nothing of a bench is worth closing in order


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
