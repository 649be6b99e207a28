"""The client for asyncio; each belongs to the event loop in which it was made."""

import asyncio
import contextlib
import json
import secrets
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Sequence,
)
from typing import Any, Self, TypeVar

import grpc

from baton.client.answer import Chunk, Completion, Resumed, Timing, chunk_of, completion_of
from baton.client.batch import AsyncSending, Item, event_of
from baton.client.channel import OPTIONS, REQUEST_ID, ClientTls, compression_of, metadata_of
from baton.client.options import Message, Options, Prompt, checked_chat, request_of
from baton.client.retries import Attempts, Retry, RetryBudget
from baton.core.clock import monotonic
from baton.core.errors import BatonError
from baton.proto import inference_pb2 as pb
from baton.proto import inference_pb2_grpc as pb_grpc
from baton.proto.errors import from_rpc_error

Response = TypeVar("Response")

_END_S = 5.0
"""For a server to answer that it has ended a request that is left."""


class AsyncStream(AsyncIterator[Chunk]):
    """The chunks of one request, as they come. Closing it cancels the request."""

    def __init__(self, chunks: AsyncGenerator[Chunk, None], timing: Timing) -> None:
        self._chunks = chunks
        self.timing = timing
        """When chunks came."""

    async def __anext__(self) -> Chunk:
        return await anext(self._chunks)

    async def aclose(self) -> None:
        """Take no more; a request that is not over is cancelled."""
        await self._chunks.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        return f"AsyncStream({self.timing})"


class AsyncClient:
    """Talks to one gateway. Use it as an asynchronous context manager, or close it."""

    def __init__(
        self,
        address: str,
        *,
        timeout_s: float = 600.0,
        api_key: str = "",
        tls: ClientTls | None = None,
        retry: Retry | None = None,
        compress: bool = False,
    ) -> None:
        """`address` is host:port; `timeout_s` is for each whole request, with all its attempts.

        Without `tls` the connection is not encrypted, and the key can be read on its way. With
        `compress` requests are sent as gzip: for long prompts over slow links.
        """
        self._address = address
        self._timeout_s = timeout_s
        self._metadata = metadata_of(api_key)
        self._retry = retry or Retry()
        self._budget = RetryBudget(self._retry)
        compression = compression_of(compress)
        if tls is None:
            self._channel = grpc.aio.insecure_channel(
                address, options=OPTIONS, compression=compression
            )
        else:
            self._channel = grpc.aio.secure_channel(
                address, tls.credentials(), options=OPTIONS, compression=compression
            )
        self._stub = pb_grpc.InferenceStub(self._channel)

    async def generate(
        self, prompt: Prompt, options: Options | None = None, *, timeout_s: float | None = None
    ) -> AsyncGenerator[str, None]:
        """Yield the text of one prompt as it comes; of its first choice.

        Closing the iterator cancels the request. Raises what the server raised (core/errors.py).
        """
        async with self.stream(prompt, options, timeout_s=timeout_s) as chunks:
            async for chunk in chunks:
                if chunk.text and chunk.index == 0:
                    yield chunk.text

    async def complete(
        self, prompt: Prompt, options: Options | None = None, *, timeout_s: float | None = None
    ) -> Completion:
        """Return the whole answer to one prompt."""
        async with self.stream(prompt, options, timeout_s=timeout_s) as chunks:
            return completion_of([chunk async for chunk in chunks], chunks.timing)

    def stream(
        self, prompt: Prompt, options: Options | None = None, *, timeout_s: float | None = None
    ) -> AsyncStream:
        """Like `generate`, but yield everything that the server says."""
        request = request_of(prompt, options or Options())
        if self._retry.resumes:
            request.idempotency_key = secrets.token_hex(16)
        timing = Timing(monotonic)
        return AsyncStream(self._chunks(request, timing, self._attempts(timeout_s)), timing)

    def chat(
        self,
        messages: Sequence[Message],
        options: Options | None = None,
        *,
        timeout_s: float | None = None,
    ) -> AsyncStream:
        """Like `stream`, of the answer to a chat; raises InvalidRequest if nothing was said."""
        return self.stream(checked_chat(messages), options, timeout_s=timeout_s)

    def _attempts(self, timeout_s: float | None = None) -> Attempts:
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        return Attempts(self._retry, self._budget, monotonic, limit_s)

    async def _chunks(
        self, request: pb.GenerateRequest, timing: Timing, attempts: Attempts
    ) -> AsyncGenerator[Chunk, None]:
        told = Resumed()
        while True:
            timing.attempts += 1
            told.restart()
            call = self._stub.Generate(
                request, timeout=attempts.seconds_left(), metadata=self._metadata
            )
            try:
                async for response in call:
                    if told.is_new(response):
                        chunk = chunk_of(response)
                        timing.came(chunk)
                        yield chunk
            except grpc.aio.AioRpcError as error:
                failed = from_rpc_error(error)
            except (GeneratorExit, asyncio.CancelledError):
                if self._retry.resumes and told.began:
                    await self._end(call)
                raise
            else:
                attempts.succeeded()
                return
            finally:
                call.cancel()
            await self._pause(attempts, failed, began=told.began)

    async def _end(self, call: grpc.aio.UnaryStreamCall[Any, Any]) -> None:
        """End what the server would go on with for us to come back."""
        with contextlib.suppress(grpc.aio.AioRpcError):
            request_id = dict(await call.initial_metadata()).get(REQUEST_ID, "")
            ask = pb.CancelRequest(request_id=str(request_id))
            await self._stub.Cancel(ask, timeout=_END_S, metadata=self._metadata)

    async def _pause(self, attempts: Attempts, failed: BatonError, *, began: bool = False) -> None:
        """Wait until the next attempt is due; raises `failed` if there is none."""
        pause_s = attempts.pause_after(failed, began=began)
        if pause_s is None:
            raise failed
        await asyncio.sleep(pause_s)

    async def _call(self, method: Callable[..., Awaitable[Response]], request: object) -> Response:
        attempts = self._attempts()
        while True:
            left_s = attempts.seconds_left()
            try:
                response = await method(request, timeout=left_s, metadata=self._metadata)
            except grpc.aio.AioRpcError as error:
                failed = from_rpc_error(error)
            else:
                attempts.succeeded()
                return response
            await self._pause(attempts, failed)

    async def generate_batch(
        self, requests: Iterable[Item] | AsyncIterable[Item], *, timeout_s: float | None = None
    ) -> AsyncGenerator[tuple[str, Chunk | BatonError], None]:
        """Run many requests, (id, prompt, options) each, by one call; yield (id, what came).

        No two of them that are open at once may have the same id. They are taken from `requests`
        as the server has room for them. An error ends one request, and nothing is sent
        again; what ends the call is raised, and what `requests` raises once all is over. Closing
        the iterator cancels all.
        """
        sending = AsyncSending(requests)
        call = self._stub.GenerateBatch(
            sending.messages(),
            timeout=self._timeout_s if timeout_s is None else timeout_s,
            metadata=self._metadata,
        )
        try:
            async for told in call:
                sending.heard(told)
                if (event := event_of(told)) is not None:
                    yield told.id, event
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None
        finally:
            call.cancel()
        if sending.failed is not None:
            raise sending.failed

    async def cancel(self, request_id: str) -> int:
        """End an open request of one's own, read by whomever; return how many choices it had."""
        ask = pb.CancelRequest(request_id=request_id)
        told: pb.CancelResponse = await self._call(self._stub.Cancel, ask)
        return told.cancelled

    async def explain(self, request_id: str) -> dict[str, Any] | None:
        """Return why a request of one's own went where it did; None if it is not known any more."""
        ask = pb.ExplainRequest(request_id=request_id)
        told: pb.ExplainResponse = await self._call(self._stub.Explain, ask)
        return json.loads(told.json) if told.HasField("json") else None

    async def tokenize(self, text: str, *, model: str = "") -> list[int]:
        """Return the tokens of a text, as a prompt of that text would have them."""
        ask = pb.TokenizeRequest(model=model, text=text)
        return list((await self._call(self._stub.Tokenize, ask)).token_ids)

    async def detokenize(self, token_ids: Iterable[int], *, model: str = "") -> str:
        """Return the text of tokens, special ones included."""
        ask = pb.DetokenizeRequest(model=model, token_ids=token_ids)
        told: pb.DetokenizeResponse = await self._call(self._stub.Detokenize, ask)
        return told.text

    async def models(self) -> dict[str, int]:
        """Return the length limit, in tokens, of each model by its name."""
        told = await self._call(self._stub.ListModels, pb.ListModelsRequest())
        return {model.id: model.max_model_len for model in told.models}

    async def close(self) -> None:
        """Close the channel; open requests are cancelled."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"AsyncClient({self._address})"
