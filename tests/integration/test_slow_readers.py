"""A thousand clients that ask and take nothing are cut; the rest is served as if nothing were."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from baton.api import serve
from baton.api.gateway import Gateway
from baton.api.serve import FrontDoor
from baton.core.config import GatewayConfig
from baton.core.metrics import GatewayMetrics
from baton.core.topology import Membership, MembershipBoard
from baton.models.tokenizer import load_tokenizer

READERS = 1000
OTHERS = 10
PATIENCE_S = 900.0
SMALL = 1 << 12
"""Bytes that kernels on both sides may hold: an answer of some dozen tokens is then too long."""
SLOW = {"prompt": "x = 1\n", "max_tokens": 1000, "stream": True, "logprobs": 5, "ignore_eos": True}
OTHER = {"prompt": "def f(a, b):\n", "max_tokens": 8, "temperature": 0}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@asynccontextmanager
async def silent_reader(url: str) -> AsyncIterator[None]:
    """Ask for a long stream, and never read of it."""
    parts, body = urlsplit(url), json.dumps(SLOW).encode()
    head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    loop = asyncio.get_running_loop()
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL)
        raw.setblocking(False)
        await loop.sock_connect(raw, (parts.hostname, parts.port))
        await loop.sock_sendall(raw, f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        yield


async def test_a_thousand_slow_readers_are_cut_and_hold_nothing(
    start_pair: Any, tools: Any, demo_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "_SEND_BUFFER_BYTES", SMALL)
    decode = {"max_sequences": 128, "kv_memory_mib": 256}
    pair = await start_pair(demo_model_dir, decode=decode)
    gateway = Gateway(
        GatewayConfig(
            http_port=0,
            grpc_port=0,
            lease_s=60,
            max_open_requests=2 * READERS,
            max_queued_requests=2 * READERS,
            queue_timeout_s=PATIENCE_S,
            request_timeout_s=PATIENCE_S,
            limits={"reader_timeout_s": 1.0},
        ),
        load_tokenizer(demo_model_dir),
        "demo",
        MembershipBoard(Membership(1, (pair.decode.info,))),
        GatewayMetrics(),
        expects_prefill=False,
    )
    await gateway.start()
    door = await FrontDoor.start(gateway)

    def cut() -> bool:
        name = f'baton_connections_cut_total{{reason="slow_reader"}} {READERS:.1f}'
        return name in gateway.metrics.render().decode()

    async with AsyncExitStack() as stack:
        stack.push_async_callback(door.close)
        http = await stack.enter_async_context(
            httpx.AsyncClient(base_url=door.http_url, timeout=PATIENCE_S)
        )

        async def text() -> str:
            answer = await http.post("/v1/completions", json=OTHER)
            assert answer.status_code == 200, answer.text
            return str(answer.json()["choices"][0]["text"])

        alone = await text()
        for _ in range(READERS):
            await stack.enter_async_context(silent_reader(door.http_url))
        assert [await one for one in [asyncio.create_task(text()) for _ in range(OTHERS)]] == [
            alone
        ] * OTHERS
        await tools.eventually(cut, "not all are cut", PATIENCE_S)
        await gateway.idle()
        stats = pair.decode.stats()
        assert stats["blocks_used"] == stats["running"] == stats["waiting"] == 0
        assert await text() == alone
    gateway.check()
