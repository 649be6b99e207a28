"""Chat over HTTP, where gRPC does not get through: HttpClient blocks, AsyncHttpClient does not.

    from baton.client import Message
    from baton.client.http import HttpClient

    with HttpClient("http://127.0.0.1:8000") as client:
        for chunk in client.chat([Message("user", "What is KV?")]):
            print(chunk.text, end="", flush=True)

It needs httpx: `pip install 'baton-serve[http]'`. Options, chunks and errors are those of the gRPC
client; token ids, logprobs and going on with an answer that broke off are gRPC's alone.
"""

import asyncio
import json
import ssl
import threading
from collections.abc import AsyncGenerator, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import httpx

from baton.client.answer import Chunk, Completion, Timing, completion_of
from baton.client.async_client import AsyncStream
from baton.client.channel import ClientTls
from baton.client.http_wire import Answer, chat_body, error_from, headers_of
from baton.client.options import Message, Options
from baton.client.retries import Attempts, Retry, RetryBudget
from baton.client.sync_client import Stream
from baton.core.clock import monotonic
from baton.core.errors import BatonError, Cancelled, DeadlineExceeded, InvalidConfig, Unavailable

_CHAT = "/v1/chat/completions"


class _Settings:
    """What both clients are made of."""

    def __init__(
        self, url: str, timeout_s: float, api_key: str, tls: ClientTls | None, retry: Retry | None
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise InvalidConfig("url", url, "http://host:port or https://host:port")
        self.retry = retry or Retry()
        if self.retry.resumes:
            raise InvalidConfig("resumes", True, "False over HTTP: only gRPC has idempotency keys")
        self.budget = RetryBudget(self.retry)
        self.timeout_s = timeout_s
        self.httpx: dict[str, Any] = {
            "base_url": url.rstrip("/").removesuffix("/v1"),
            "headers": {"authorization": f"Bearer {api_key}"} if api_key else {},
            "timeout": timeout_s,
            # A proxy of the environment is for the way out.
            "trust_env": False,
        }
        if tls is not None:
            self.httpx["verify"] = _context(tls)

    def attempts(self, timeout_s: float | None) -> Attempts:
        limit_s = self.timeout_s if timeout_s is None else timeout_s
        return Attempts(self.retry, self.budget, monotonic, limit_s)


def _context(tls: ClientTls) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=tls.ca)
        if tls.cert is not None:
            context.load_cert_chain(tls.cert, tls.key)
    except OSError as error:  # ssl.SSLError is one
        raise InvalidConfig("tls", str(tls.ca), f"PEM files that can be read ({error})") from None
    return context


@contextmanager
def _errors_ours() -> Iterator[None]:
    """Let no error of httpx out, nor one of what is no answer of ours."""
    try:
        yield
    except httpx.TimeoutException as error:
        raise DeadlineExceeded(f"no answer in time ({type(error).__name__})") from None
    except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError) as error:
        raise Unavailable(f"{type(error).__name__}: {error}") from None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise Unavailable(f"it answers, but not as a gateway does: {error!r}") from None


class _Chat:
    """One chat, over all attempts; what is sent and what is heard is the same for both clients."""

    def __init__(self, messages: Sequence[Message], options: Options, attempts: Attempts) -> None:
        self.body = chat_body(messages, options)
        self.timing = Timing(monotonic)
        self.attempts = attempts
        self.began = False
        self._options = options
        self._answer = Answer()

    def begin(self) -> dict[str, Any]:
        """Return how the next attempt is sent."""
        self.timing.attempts += 1
        self._answer = Answer()
        left_s = self.attempts.seconds_left()
        headers = headers_of(self._options, left_s)
        return {"json": self.body, "headers": headers, "timeout": max(left_s, 0.001)}

    def heard(self, line: str) -> list[Chunk]:
        """Return what a line brings."""
        if self.attempts.seconds_left() <= 0:
            raise DeadlineExceeded("the answer took longer than was allowed")
        chunks = self._answer.read(line)
        for chunk in chunks:
            self.began = True
            self.timing.came(chunk)
            if chunk.completion_tokens:
                self.timing.counted(chunk.completion_tokens)
        return chunks

    def ended(self) -> None:
        """Check that the answer is whole."""
        self._answer.check_complete()
        self.attempts.succeeded()

    def pause_s(self, failed: BatonError) -> float:
        """Return for how long to wait before the next attempt; raises `failed` if there is none."""
        pause_s = self.attempts.pause_after(failed, began=self.began)
        if pause_s is None:
            raise failed
        return pause_s


class HttpClient:
    """Talks to one gateway. Use it as a context manager, or close it; threads may share one."""

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = 600.0,
        api_key: str = "",
        tls: ClientTls | None = None,
        retry: Retry | None = None,
    ) -> None:
        """`url` is http(s)://host:port; `timeout_s` is for each whole chat, with all attempts.

        Without `tls`, https asks for a certificate that the system's authorities vouch for.
        """
        self._settings = _Settings(url, timeout_s, api_key, tls, retry)
        self._http = httpx.Client(**self._settings.httpx)
        self._closed = threading.Event()

    def chat(
        self,
        messages: Sequence[Message],
        options: Options | None = None,
        *,
        timeout_s: float | None = None,
    ) -> Stream:
        """Yield the answer to a chat as it comes. Closing the stream cancels the request."""
        chat = _Chat(messages, options or Options(), self._settings.attempts(timeout_s))
        return Stream(self._chunks(chat), chat.timing)

    def complete(
        self,
        messages: Sequence[Message],
        options: Options | None = None,
        *,
        timeout_s: float | None = None,
    ) -> Completion:
        """Return the whole answer to a chat."""
        with self.chat(messages, options, timeout_s=timeout_s) as chunks:
            return completion_of(chunks, chunks.timing)

    def _chunks(self, chat: _Chat) -> Generator[Chunk, None, None]:
        while True:
            try:
                yield from self._attempt(chat)
            except BatonError as error:
                if self._closed.wait(chat.pause_s(error)):
                    raise Cancelled("the client was closed") from None
            else:
                return

    def _attempt(self, chat: _Chat) -> Generator[Chunk, None, None]:
        with _errors_ours(), self._http.stream("POST", _CHAT, **chat.begin()) as response:
            if response.is_error:
                text = response.read().decode(errors="replace")
                raise error_from(response.status_code, response.headers, text)
            for line in response.iter_lines():
                yield from chat.heard(line)
            chat.ended()

    def models(self) -> dict[str, int]:
        """Return the length limit, in tokens, of each model by its name."""
        with _errors_ours():
            return _models(self._http.get("/v1/models"))

    def close(self) -> None:
        """Close the connections; open requests are cancelled."""
        self._closed.set()
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"HttpClient({self._http.base_url})"


class AsyncHttpClient:
    """The same for asyncio."""

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = 600.0,
        api_key: str = "",
        tls: ClientTls | None = None,
        retry: Retry | None = None,
    ) -> None:
        """See HttpClient."""
        self._settings = _Settings(url, timeout_s, api_key, tls, retry)
        self._http = httpx.AsyncClient(**self._settings.httpx)

    def chat(
        self,
        messages: Sequence[Message],
        options: Options | None = None,
        *,
        timeout_s: float | None = None,
    ) -> AsyncStream:
        """Yield the answer to a chat as it comes. Closing the stream cancels the request."""
        chat = _Chat(messages, options or Options(), self._settings.attempts(timeout_s))
        return AsyncStream(self._chunks(chat), chat.timing)

    async def complete(
        self,
        messages: Sequence[Message],
        options: Options | None = None,
        *,
        timeout_s: float | None = None,
    ) -> Completion:
        """Return the whole answer to a chat."""
        async with self.chat(messages, options, timeout_s=timeout_s) as chunks:
            return completion_of([chunk async for chunk in chunks], chunks.timing)

    async def _chunks(self, chat: _Chat) -> AsyncGenerator[Chunk, None]:
        while True:
            try:
                with _errors_ours():
                    async with self._http.stream("POST", _CHAT, **chat.begin()) as response:
                        if response.is_error:
                            text = (await response.aread()).decode(errors="replace")
                            raise error_from(response.status_code, response.headers, text)
                        async for line in response.aiter_lines():
                            for chunk in chat.heard(line):
                                yield chunk
                        chat.ended()
                        return
            except BatonError as error:
                pause_s = chat.pause_s(error)
            await asyncio.sleep(pause_s)

    async def models(self) -> dict[str, int]:
        """Return the length limit, in tokens, of each model by its name."""
        with _errors_ours():
            return _models(await self._http.get("/v1/models"))

    async def close(self) -> None:
        """Close the connections; open requests are cancelled."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"AsyncHttpClient({self._http.base_url})"


def _models(response: httpx.Response) -> dict[str, int]:
    if response.is_error:
        raise error_from(response.status_code, response.headers, response.text)
    rows = json.loads(response.text)["data"]
    return {row["id"]: row["max_model_len"] or 0 for row in rows}
