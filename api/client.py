"""A small Python client of the gRPC API."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Self, cast

import grpc

from baton.core.request import TokenLogprobs
from baton.proto import inference_pb2 as pb
from baton.proto import inference_pb2_grpc as pb_grpc
from baton.proto.errors import from_rpc_error


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to generate; None leaves the choice to the server (see proto/inference.proto)."""

    model: str = ""
    """Empty: the only model that is served."""
    max_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    bad_words: tuple[str, ...] = ()
    min_tokens: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    n: int | None = None
    logprobs: int | None = None
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Chunk:
    """What became certain with one message."""

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    """`stop` or `length` in the last chunk of a choice, empty before."""
    prompt_tokens: int
    completion_tokens: int
    cached_prompt_tokens: int
    """All three are set in the last chunk of a choice, 0 before."""
    index: int = 0
    """Of the choice: with `n` over 1 the choices come interleaved."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One for each of `token_ids`, if they were asked for."""


@dataclass(frozen=True, slots=True)
class ClientTls:
    """How a client knows its server, and what it shows; PEM files."""

    ca: Path
    """The authority of the server's certificate."""
    cert: Path | None = None
    """The client's own certificate, if the server asks for one."""
    key: Path | None = None
    """The private key to it."""


class Client:
    """Talks to one gateway. Use it as a context manager, or close it."""

    def __init__(
        self,
        address: str,
        *,
        timeout_s: float = 600.0,
        api_key: str = "",
        tls: ClientTls | None = None,
    ) -> None:
        """`address` is host:port; `timeout_s` is for each whole request.

        Without `tls` the connection is not encrypted, and the key can be read on its way.
        """
        self._address = address
        self._timeout_s = timeout_s
        self._metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()
        self._channel = _channel(address, tls)
        self._stub = pb_grpc.InferenceStub(self._channel)

    def generate(
        self, prompt: str | Sequence[int], options: Options | None = None
    ) -> Iterator[str]:
        """Yield the text of one prompt (a string or token ids) as it comes; of its first choice.

        Closing the iterator cancels the request. Raises what the server raised (core/errors.py).
        """
        for chunk in self.stream(prompt, options):
            if chunk.text and chunk.index == 0:
                yield chunk.text

    def stream(
        self, prompt: str | Sequence[int], options: Options | None = None
    ) -> Iterator[Chunk]:
        """Like `generate`, but yield everything that the server says."""
        call = self._stub.Generate(
            _request(prompt, options or Options()),
            timeout=self._timeout_s,
            metadata=self._metadata,
        )
        try:
            for response in call:
                yield _chunk(response)
        except grpc.RpcError as error:
            raise from_rpc_error(cast(grpc.aio.AioRpcError, error)) from None
        finally:
            call.cancel()

    def models(self) -> dict[str, int]:
        """Return the length limit, in tokens, of each model by its name."""
        try:
            response = self._stub.ListModels(
                pb.ListModelsRequest(), timeout=self._timeout_s, metadata=self._metadata
            )
        except grpc.RpcError as error:
            raise from_rpc_error(cast(grpc.aio.AioRpcError, error)) from None
        return {model.id: model.max_model_len for model in response.models}

    def close(self) -> None:
        """Close the channel; open requests are cancelled."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Client({self._address})"


def _channel(address: str, tls: ClientTls | None) -> grpc.Channel:
    options = (("grpc.enable_http_proxy", 0),)
    if tls is None:
        return grpc.insecure_channel(address, options=options)
    credentials = grpc.ssl_channel_credentials(
        tls.ca.read_bytes(),
        None if tls.key is None else tls.key.read_bytes(),
        None if tls.cert is None else tls.cert.read_bytes(),
    )
    return grpc.secure_channel(address, credentials, options=options)


def _request(prompt: str | Sequence[int], options: Options) -> pb.GenerateRequest:
    is_text = isinstance(prompt, str)
    return pb.GenerateRequest(
        text=prompt if isinstance(prompt, str) else None,
        token_ids=None if is_text else pb.TokenIds(ids=cast(Sequence[int], prompt)),
        **{option.name: getattr(options, option.name) for option in fields(options)},
    )


def _chunk(response: pb.GenerateResponse) -> Chunk:
    return Chunk(
        request_id=response.request_id,
        text=response.text,
        token_ids=tuple(response.token_ids),
        finish_reason=response.finish_reason,
        prompt_tokens=response.usage.prompt_tokens,
        completion_tokens=response.usage.completion_tokens,
        cached_prompt_tokens=response.usage.cached_prompt_tokens,
        index=response.index,
        logprobs=tuple(
            TokenLogprobs(told.logprob, tuple((top.token_id, top.logprob) for top in told.top))
            for told in response.logprobs
        ),
    )
