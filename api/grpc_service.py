"""The public gRPC API: baton.v1.Inference, health and reflection."""

import asyncio
from contextlib import aclosing
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from baton.api.choices import choice_pieces
from baton.api.gateway import Gateway
from baton.api.validate import INLINE_BYTES, Call, ServedModel, completion_call
from baton.core.clock import monotonic
from baton.core.config import EdgeLimits
from baton.core.errors import (
    BatonError,
    DeadlineExceeded,
    InternalError,
    InvalidConfig,
    InvalidRequest,
)
from baton.core.log import get_logger
from baton.core.request import TokenLogprobs
from baton.core.spans import Arrival
from baton.core.tenants import Caller
from baton.proto import inference_pb2 as pb
from baton.proto import inference_pb2_grpc as pb_grpc
from baton.proto.errors import to_status
from baton.proto.grpc_tls import listen

_log = get_logger("grpc")
_SERVICE = pb.DESCRIPTOR.services_by_name["Inference"].full_name
_OPTIONS = (
    ("grpc.so_reuseport", 0),  # A port in use is an error, and not a shared port.
    # A client that is cut off is noticed, and its requests cancelled.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
)


def _options(limits: EdgeLimits) -> tuple[tuple[str, int], ...]:
    return (
        *_OPTIONS,
        ("grpc.max_receive_message_length", limits.max_body_bytes),
        # Up to the first it is always taken, beyond the second never; between them by chance.
        ("grpc.max_metadata_size", limits.max_header_bytes),
        ("grpc.absolute_max_metadata_size", limits.max_header_bytes),
        ("grpc.max_concurrent_streams", limits.streams_per_connection),
        ("grpc.server_handshake_timeout_ms", int(1000 * limits.header_timeout_s)),
    )


SLOW_READER_S = 30.0
"""How much longer than the request itself may take its client may take to read the answer."""

Stream = grpc.aio.ServicerContext[pb.GenerateRequest, pb.GenerateResponse]


class InferenceService(pb_grpc.InferenceServicer):
    """Serves a gateway; a call that is cancelled takes its request with it."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def Generate(self, request: pb.GenerateRequest, context: Stream) -> None:
        """Stream the text of one prompt; see proto/inference.proto."""
        try:
            caller = self._caller(context)
            valid = await self._validate(request, caller, _traceparent(context))
            limit_s = self._gateway.config.request_timeout_s + SLOW_READER_S
            async with asyncio.timeout(limit_s):
                await self._stream(valid, context)
        except BatonError as error:
            await context.abort(*to_status(error))
        except _SlowReader:
            limit_s = self._gateway.config.limits.reader_timeout_s
            late = DeadlineExceeded(f"nothing of the answer was read for {limit_s:g} s")
            await context.abort(*to_status(late))
        except TimeoutError:
            late = DeadlineExceeded(f"the answer was not read within {limit_s:g} s")
            await context.abort(*to_status(late))
        except Exception as bug:
            _log.error("a bug ended a call", exc_info=bug)
            internal = InternalError(f"{type(bug).__name__} in the gateway; see its log")
            await context.abort(*to_status(internal))

    def _caller(self, context: grpc.aio.ServicerContext[Any, Any]) -> Caller:
        """Return whose call it is; every method asks, and tests that each does."""
        try:
            return self._gateway.identity.caller(_authorization(context))
        except BatonError as error:
            self._gateway.metrics.refused(error.code)
            raise

    async def _validate(
        self, request: pb.GenerateRequest, caller: Caller, traceparent: str
    ) -> Call:
        try:
            came_at = monotonic()
            await self._gateway.some_decode()
            found_at = monotonic()
            model = self._gateway.model(caller)
            if request.ByteSize() <= INLINE_BYTES:
                call = _call(request, model)
            else:
                call = await asyncio.to_thread(_call, request, model)
            spent_s = (found_at - came_at, monotonic() - found_at)
            return call.arrived(Arrival(*spent_s, self._gateway.now(), traceparent))
        except BatonError as error:
            self._gateway.metrics.refused(error.code)
            raise

    async def _stream(self, call: Call, context: Stream) -> None:
        output_tokens = [0] * len(call.requests)
        async with aclosing(choice_pieces(self._gateway, call)) as pieces:
            async for index, piece in pieces:
                generate = call.requests[index].generate
                output_tokens[index] += len(piece.tokens)
                response = pb.GenerateResponse(
                    request_id=generate.request_id,
                    text=piece.text,
                    token_ids=piece.tokens,
                    index=index,
                    logprobs=[_logprobs(told) for told in piece.logprobs],
                )
                if piece.finish is not None:
                    response.finish_reason = piece.finish
                    response.usage.prompt_tokens = len(generate.prompt)
                    response.usage.completion_tokens = output_tokens[index]
                    response.usage.cached_prompt_tokens = piece.cached_tokens
                await self._write(context, response)

    async def _write(self, context: Stream, response: pb.GenerateResponse) -> None:
        """Hand a message over to the connection, once the client has taken those before it."""
        try:
            async with asyncio.timeout(self._gateway.config.limits.reader_timeout_s):
                await context.write(response)
        except TimeoutError:
            raise _SlowReader from None

    async def ListModels(
        self, request: pb.ListModelsRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> pb.ListModelsResponse:
        """List the one model, if the caller may use it."""
        try:
            caller = self._caller(context)
            if not self._gateway.serves(caller):
                return pb.ListModelsResponse()
            model = self._gateway.model(caller)
        except BatonError as error:
            await context.abort(*to_status(error))
            raise
        row = pb.Model(id=model.name, max_model_len=model.max_model_len)
        return pb.ListModelsResponse(models=[row])


class _SlowReader(Exception):
    """The client takes nothing."""


def _authorization(context: grpc.aio.ServicerContext[Any, Any]) -> str | None:
    found = [v for name, v in context.invocation_metadata() or () if name == "authorization"]
    return str(found[0]) if len(found) == 1 else None


_OPTIONAL = (
    "max_tokens",
    "temperature",
    "top_k",
    "top_p",
    "seed",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "min_tokens",
    "n",
    "logprobs",
)


def _traceparent(context: Stream) -> str:
    metadata = dict(context.invocation_metadata() or ())
    return str(metadata.get("traceparent", ""))


def _call(request: pb.GenerateRequest, model: ServedModel) -> Call:
    return completion_call(_body(request), model, prefix="gen")


def _body(request: pb.GenerateRequest) -> dict[str, object]:
    """Return the request as the HTTP API would have it, so that one place checks both."""
    body: dict[str, object] = {
        "model": request.model or None,
        "stop": list(request.stop) or None,
        "ignore_eos": request.ignore_eos,
        "logit_bias": {str(token): bias for token, bias in request.logit_bias.items()},
        "bad_words": list(request.bad_words),
        "stop_token_ids": list(request.stop_token_ids),
        "priority": request.priority or None,
    }
    for name in _OPTIONAL:
        if request.HasField(name):
            body[name] = getattr(request, name)
    match request.WhichOneof("prompt"):
        case "text":
            body["prompt"] = request.text
        case "token_ids":
            body["prompt"] = list(request.token_ids.ids)
        case _:
            raise InvalidRequest("prompt", None, "text or token_ids")
    return body


def _logprobs(told: TokenLogprobs) -> pb.TokenLogprobs:
    top = [pb.TopLogprob(token_id=token, logprob=logprob) for token, logprob in told.top]
    return pb.TokenLogprobs(logprob=told.logprob, top=top)


class InferenceServer:
    """The service on its port."""

    def __init__(
        self, server: grpc.aio.Server, address: str, servicer: health.aio.HealthServicer
    ) -> None:
        self.address = address
        """host:port, with the port that was really taken."""
        self._server = server
        self._health = servicer

    @classmethod
    async def start(cls, gateway: Gateway) -> "InferenceServer":
        """Listen where the gateway's config says; raises InvalidConfig if the port is in use."""
        host, port = gateway.config.host, gateway.config.grpc_port
        server = grpc.aio.server(options=_options(gateway.config.limits))
        pb_grpc.add_InferenceServicer_to_server(InferenceService(gateway), server)
        servicer = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
        names = (_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        bound = listen(server, f"{host}:{port}", gateway.config.tls)
        if bound == 0:
            raise InvalidConfig("grpc_port", port, f"a port that is free on {host}")
        await server.start()
        for name in ("", _SERVICE):
            await servicer.set(name, health_pb2.HealthCheckResponse.SERVING)
        return cls(server, f"{host}:{bound}", servicer)

    async def close(self, grace_s: float = 1.0) -> None:
        """Refuse new calls, give open ones `grace_s` seconds, then end them."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)
