"""The demo's users: each streams one request, by HTTP or by gRPC."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx

from baton.cli.demo.record import Record
from baton.client import Chunk, Client, Options
from baton.core.errors import Unavailable

_TIMEOUT_S = 60.0
SAMPLING: dict[str, float] = {"temperature": 0.6, "top_p": 0.95}


class Users:
    """Talks to one server as several users would."""

    def __init__(self, http_url: str, grpc_address: str, model: str) -> None:
        # trust_env: a proxy set for the internet has no part in a talk with 127.0.0.1.
        self._http = httpx.AsyncClient(base_url=http_url, timeout=_TIMEOUT_S, trust_env=False)
        self._grpc_address = grpc_address
        self._model = model
        self._began = time.monotonic()

    async def __aenter__(self) -> "Users":
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._http.aclose()

    def start_clock(self) -> None:
        """Count time from now."""
        self._began = time.monotonic()

    async def stream(self, record: Record, seed: int, on_text: Callable[[str], None]) -> None:
        """Send one request and fill its record while the text comes."""
        record.sent = time.monotonic() - self._began
        source = self._by_grpc if record.prompt.by_grpc else self._by_http
        async for text in source(record, seed):
            record.arrivals.append(time.monotonic() - self._began)
            record.text += text
            on_text(text)

    async def trace(self, record: Record) -> dict[str, Any]:
        """Ask the gateway where the request's time went."""
        answer = await self._http.get(f"/v1/requests/{record.request_id}")
        answer.raise_for_status()
        found: dict[str, Any] = answer.json()
        return found

    async def _by_http(self, record: Record, seed: int) -> AsyncIterator[str]:
        body = {
            "model": self._model,
            "prompt": record.prompt.text,
            "max_tokens": record.prompt.max_tokens,
            "stream": True,
            "seed": seed,
            **SAMPLING,
        }
        async with self._http.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                raise Unavailable(f"HTTP {answer.status_code}: {(await answer.aread()).decode()}")
            async for line in answer.aiter_lines():
                data = line.removeprefix("data: ")
                if not line.startswith("data: ") or data == "[DONE]":
                    continue
                chunk = json.loads(data)
                if "error" in chunk:
                    raise Unavailable(chunk["error"]["message"])
                record.request_id = chunk["id"]
                for choice in chunk["choices"]:
                    if choice["text"]:
                        yield choice["text"]

    async def _by_grpc(self, record: Record, seed: int) -> AsyncIterator[str]:
        loop = asyncio.get_running_loop()
        chunks: asyncio.Queue[Chunk | None] = asyncio.Queue()  # bounded by max_tokens
        options = Options(
            max_tokens=record.prompt.max_tokens,
            seed=seed,
            temperature=SAMPLING["temperature"],
            top_p=SAMPLING["top_p"],
        )
        with Client(self._grpc_address, timeout_s=_TIMEOUT_S) as client:

            def read() -> None:  # in a thread: the client is an ordinary, blocking one
                try:
                    for chunk in client.stream(record.prompt.text, options):
                        loop.call_soon_threadsafe(chunks.put_nowait, chunk)
                finally:
                    loop.call_soon_threadsafe(chunks.put_nowait, None)

            reading = asyncio.create_task(asyncio.to_thread(read))
            while (chunk := await chunks.get()) is not None:
                record.request_id = chunk.request_id
                if chunk.text:
                    yield chunk.text
            await reading
