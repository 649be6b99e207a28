"""A request all the way, where gateway, decode and prefill speak mutual TLS."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from baton.api.gateway import Gateway
from baton.api.validate import completion_call
from baton.cli.certs import write_certs
from baton.cli.tls import cluster_tls
from baton.core.config import ClusterTlsConfig, GatewayConfig
from baton.core.metrics import GatewayMetrics
from baton.core.served_model import FrontModel
from baton.core.tenants import Caller, Tenant
from baton.core.topology import Membership, MembershipBoard, Role
from baton.decode_worker.worker import DecodeWorker
from baton.models.tokenizer import load_tokenizer
from baton.prefill_worker.worker import PrefillWorker

PATIENCE_S = 60.0


@pytest.fixture
def tls(tmp_path: Path) -> ClusterTlsConfig:
    write_certs(tmp_path)
    found = cluster_tls(tmp_path)
    assert found is not None
    return found


@pytest.fixture
async def workers(tools: Any, demo_model_dir: Path, tls: ClusterTlsConfig) -> AsyncIterator[Any]:
    async with AsyncExitStack() as stack:
        started = []
        for kind, role in ((PrefillWorker, Role.PREFILL), (DecodeWorker, Role.DECODE)):
            config = tools.worker_config(role, f"{role}-0", demo_model_dir, kv_memory_mib=16)
            config = config.model_copy(update={"tls": tls})
            worker = await kind.start(config, on_progress=lambda line: None)
            started.append(await stack.enter_async_context(worker))
        yield started


async def test_a_request_is_handed_over(
    workers: Any, demo_model_dir: Path, tls: ClusterTlsConfig, tools: Any
) -> None:
    caller = Caller(Tenant(name="acme"))
    gateway = Gateway(
        GatewayConfig(),
        {FrontModel(name="demo", expects_prefill=True): load_tokenizer(demo_model_dir)},
        MembershipBoard(Membership(1, tuple(worker.info for worker in workers))),
        GatewayMetrics(),
        tls=tls,
    )
    async with gateway, asyncio.timeout(PATIENCE_S):
        call = completion_call({"prompt": "x " * 100, "max_tokens": 4}, gateway.model(caller))
        async for piece in gateway.generate(call.requests[0]):
            last = piece
        assert last.finish is not None
        await gateway.idle()
        trace = gateway.trace(call.call_id, caller)
        assert trace is not None
        assert [handover.outcome for handover in trace.handovers] == ["ok"]
        stranger = replace(caller, tenant=Tenant(name="other"))
        assert gateway.trace(call.call_id, stranger) is None
    gateway.check()
    with pytest.raises((grpc.aio.AioRpcError, TimeoutError)):
        async with asyncio.timeout(PATIENCE_S), tools.open_session(workers[1].info.address):
            raise AssertionError("a session without a certificate")
