"""Spans of requests through real workers, as an OpenTelemetry collector gets them by OTLP."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as pb_grpc

from baton.api.gateway import Gateway
from baton.api.serve import FrontDoor
from baton.core.config import GatewayConfig
from baton.core.metrics import GatewayMetrics
from baton.core.served_model import FrontModel
from baton.core.topology import Membership, MembershipBoard
from baton.models.tokenizer import load_tokenizer
from baton.proto import inference_pb2, inference_pb2_grpc

PATIENCE_S = 60.0
TRACE_ID, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE_ID}-{PARENT}-01"


class Collector(pb_grpc.TraceServiceServicer):
    """Takes what is sent."""

    def __init__(self) -> None:
        self.spans: list[Any] = []

    async def Export(self, request: Any, context: Any) -> Any:
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                self.spans += scope.spans
        return pb.ExportTraceServiceResponse()


@pytest.fixture
async def collector() -> AsyncIterator[tuple[Collector, str]]:
    server = grpc.aio.server()
    taker = Collector()
    pb_grpc.add_TraceServiceServicer_to_server(taker, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield taker, f"http://127.0.0.1:{port}"
    await server.stop(None)


async def test_a_collector_gets_each_request_as_a_tree_under_its_callers_span(
    collector: tuple[Collector, str], start_pair: Any, demo_model_dir: Path
) -> None:
    taker, endpoint = collector
    pair = await start_pair(demo_model_dir, prefill={"max_batch_tokens": 32})
    gateway = Gateway(
        GatewayConfig(http_port=0, grpc_port=0, otlp_endpoint=endpoint),
        {FrontModel(name="demo", expects_prefill=True): load_tokenizer(demo_model_dir)},
        MembershipBoard(Membership(1, (pair.prefill.info, pair.decode.info))),
        GatewayMetrics(),
    )
    await gateway.start()
    door = await FrontDoor.start(gateway)
    try:
        body = {"model": "demo", "prompt": "def f():\n" * 20, "max_tokens": 4, "temperature": 0}
        async with httpx.AsyncClient(timeout=PATIENCE_S) as client:
            url = f"{door.http_url}/v1/completions"
            answer = await client.post(url, json=body, headers={"traceparent": TRACEPARENT})
        async with grpc.aio.insecure_channel(door.grpc_address) as channel:
            call = inference_pb2_grpc.InferenceStub(channel).Generate(
                inference_pb2.GenerateRequest(text="class A:\n", max_tokens=2),
                metadata=(("traceparent", "no such thing"),),
                timeout=PATIENCE_S,
            )
            async for _ in call:
                pass
        trace = gateway.trace(answer.json()["id"])
        assert trace is not None
    finally:
        async with asyncio.timeout(PATIENCE_S):
            await door.close()  # which sends what is left
    ours = {s.name: s for s in taker.spans if s.trace_id.hex() == TRACE_ID}
    parents = {s.span_id: s.name for s in ours.values()}
    tree = {name: parents.get(span.parent_span_id) for name, span in ours.items()}
    wanted = {
        "tokenize": "request",
        "decode": "request",
        "generate": "request",
        "handover": "decode",
        "prefill": "handover",
        "transfer": "handover",
        "prefill_compute": "prefill",
        "chunk": "prefill_compute",
        "kv_read": "handover",
        "rank_transfer": "handover",
    }
    assert tree.items() >= wanted.items()
    assert ours["request"].parent_span_id.hex() == PARENT
    seconds = {n: (s.end_time_unix_nano - s.start_time_unix_nano) / 1e9 for n, s in ours.items()}
    assert seconds["request"] == pytest.approx(trace.e2e_s, abs=1e-6)
    assert seconds["decode"] == pytest.approx(trace.ttft_spans.decode.total_s, abs=1e-6)
    assert seconds["prefill_compute"] == pytest.approx(trace.handovers[0].compute_s, abs=1e-6)
    # Each chunk, each group of layers, and each rank of decode has its own.
    [handover] = trace.handovers
    names = [s.name for s in taker.spans if s.trace_id.hex() == TRACE_ID]
    assert names.count("chunk") == handover.chunks > 1
    assert names.count("kv_read") == len(handover.offers) >= handover.chunks
    assert names.count("rank_transfer") == 1
    assert [rank.bytes for rank in handover.ranks] == [handover.bytes]
    # Workers have the request's own span in its trace.
    own = ours["request"].span_id.hex()
    assert trace.span == f"00-{TRACE_ID}-{own}-01"
    # Who tells no span that makes sense begins a trace of his own.
    [other] = [s for s in taker.spans if s.name == "request" and s.trace_id.hex() != TRACE_ID]
    assert other.parent_span_id == b""
