"""The public gRPC API: baton.v1.Inference, health and reflection."""

import asyncio
import contextlib
import functools
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeVar

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from baton.api import anywhere
from baton.api.choices import choice_pieces
from baton.api.gateway import Gateway
from baton.api.grpc_batch import Batch
from baton.api.grpc_requests import Responses, call_of, fingerprint
from baton.api.grpc_senders import SlowSenders
from baton.api.idempotency import Answer, Runs
from baton.api.sampling_fields import check_token
from baton.api.validate import INLINE_BYTES, Call, ServedModel
from baton.core.clock import monotonic
from baton.core.config import EdgeLimits
from baton.core.errors import (
    BatonError,
    DeadlineExceeded,
    InternalError,
    InvalidConfig,
    InvalidRequest,
    Unavailable,
)
from baton.core.log import get_logger
from baton.core.spans import Arrival
from baton.core.tenants import Caller
from baton.proto import inference_pb2 as pb
from baton.proto import inference_pb2_grpc as pb_grpc
from baton.proto.errors import to_status, trailing_metadata
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
        ("grpc.max_allowed_incoming_connections", limits.max_connections),
        ("grpc.max_concurrent_streams", limits.streams_per_connection),
        ("grpc.server_handshake_timeout_ms", int(1000 * limits.header_timeout_s)),
    )


SLOW_READER_S = 30.0
"""How much longer than the request itself may take its client may take to read the answer."""

REQUEST_ID = "x-request-id"
"""Initial metadata that names a request before its first token is there."""

Context = grpc.aio.ServicerContext[Any, Any]
Service = TypeVar("Service")
Request = TypeVar("Request")
Response = TypeVar("Response")
Result = TypeVar("Result")


def _errors_told(
    method: Callable[[Service, Request, Context], Awaitable[Response]],
) -> Callable[[Service, Request, Context], Awaitable[Response]]:
    """Let a call end with the status of whatever its method raises."""

    @functools.wraps(method)
    async def told(service: Service, request: Request, context: Context) -> Response:
        try:
            return await method(service, request, context)
        except BatonError as raised:
            error = raised
        except Exception as bug:
            _log.error("a bug ended a call", exc_info=bug)
            error = InternalError(f"{type(bug).__name__} in the gateway; see its log")
        await context.abort(*to_status(error), trailing_metadata(error))
        raise error  # not reached: abort raises

    return told


async def _inline_or_not(size: int, work: Callable[[], Result]) -> Result:
    """Work here, or in a thread where that would hold up others."""
    return work() if size <= INLINE_BYTES else await asyncio.to_thread(work)


def _authorization(context: Context) -> str | None:
    found = [v for name, v in context.invocation_metadata() or () if name == "authorization"]
    return str(found[0]) if len(found) == 1 else None


def _traceparent(context: Context) -> str:
    metadata = dict(context.invocation_metadata() or ())
    return str(metadata.get("traceparent", ""))


_A_MOMENT_S = 0.001
"""Of a deadline that is over."""


class InferenceService(pb_grpc.InferenceServicer):
    """Serves a gateway; a call that is cancelled takes its requests with it."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._runs = Runs()

    async def close(self) -> None:
        """End what runs for clients that may come back."""
        await self._runs.close()

    @_errors_told
    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:
        """Stream the text of one prompt; see proto/inference.proto."""
        seconds = context.time_remaining()
        request_id, answer = await self._answer(request, context, seconds)
        await context.send_initial_metadata(((REQUEST_ID, request_id),))
        limit_s = self._gateway.config.request_timeout_s + SLOW_READER_S
        try:
            async with asyncio.timeout(limit_s), aclosing(answer):
                async for response in answer:
                    await self._write(context, response)
        except TimeoutError:
            raise DeadlineExceeded(f"the answer was not read within {limit_s:g} s") from None

    @_errors_told
    async def GenerateBatch(
        self,
        request_iterator: AsyncIterator[pb.BatchRequest],
        context: grpc.aio.ServicerContext[pb.BatchRequest, pb.BatchResponse],
    ) -> None:
        """Stream the texts of many prompts by one call; see api/grpc_batch.py."""

        async def answer(request: pb.GenerateRequest) -> AsyncGenerator[pb.GenerateResponse, None]:
            # The caller each time anew: the call may outlive the key that it came with.
            _, responses = await self._answer(request, context, None)
            async with aclosing(responses):
                async for response in responses:
                    yield response

        self._caller(context)
        await Batch(answer, lambda told: self._write(context, told)).run(request_iterator)

    async def _answer(
        self, request: pb.GenerateRequest, context: Context, left_s: float | None
    ) -> tuple[str, Answer]:
        """Return the id of a valid request and what it answers; `left_s` is for its caller alone.

        With an idempotency key both may be those of a request that came before.
        """
        caller = self._caller(context)
        call = await self._validate(request, caller, _traceparent(context))
        own_s = request.timeout_s if request.HasField("timeout_s") else None
        key = request.idempotency_key
        if not key:
            left_s = None if left_s is None else max(left_s, _A_MOMENT_S)
            return call.call_id, self._responses(call.due_within(own_s).due_within(left_s))
        run = self._runs.begin(
            (caller.tenant.name, key),
            call.call_id,
            fingerprint(request),
            lambda: self._responses(call.due_within(own_s)),
        )
        return run.request_id, run.read()

    def _caller(self, context: Context) -> Caller:
        """Return whose call it is; every method asks, and tests that each does."""
        try:
            return self._gateway.identity.caller(_authorization(context))
        except BatonError as error:
            self._gateway.metrics.refused(error.code)
            raise

    async def _validate(
        self, request: pb.GenerateRequest, caller: Caller, traceparent: str
    ) -> Call:
        name = ""
        try:
            lane = self._gateway.models.of(caller, request.model or None)
            name = lane.front.name
            came_at = monotonic()
            await lane.some_decode()
            found_at = monotonic()
            model = lane.served(caller)
            call = await _inline_or_not(request.ByteSize(), lambda: call_of(request, model))
            spent_s = (found_at - came_at, monotonic() - found_at)
            arrival = Arrival(*spent_s, self._gateway.now(), traceparent)
            return call.arrived(arrival, tell_timing=request.timing)
        except BatonError as error:
            self._gateway.metrics.refused(error.code, name)
            raise

    async def _responses(self, call: Call) -> AsyncGenerator[pb.GenerateResponse, None]:
        made = Responses(call)
        async with aclosing(choice_pieces(self._gateway, call)) as pieces:
            async for index, piece in pieces:
                yield made.of(index, piece)

    async def _write(self, context: Context, response: object) -> None:
        """Hand a message over to the connection, once the client has taken those before it."""
        try:
            async with asyncio.timeout(self._gateway.config.limits.reader_timeout_s):
                await context.write(response)
        except TimeoutError:
            self._gateway.metrics.cut("slow_reader")
            limit_s = self._gateway.config.limits.reader_timeout_s
            late = DeadlineExceeded(f"nothing of the answer was read for {limit_s:g} s")
            raise late from None

    @_errors_told
    async def Cancel(self, request: pb.CancelRequest, context: Context) -> pb.CancelResponse:
        """End a request of the caller's tenant, if it is open here or at another gateway."""
        caller = self._caller(context)
        if not request.request_id:
            raise InvalidRequest("request_id", "", "the id of a request")
        ended = await anywhere.cancel(self._gateway, request.request_id, caller)
        return pb.CancelResponse(cancelled=ended.requests, waiting=ended.waiting)

    @_errors_told
    async def Explain(self, request: pb.ExplainRequest, context: Context) -> pb.ExplainResponse:
        """Say why a request of the caller's tenant went where it did."""
        told = await anywhere.explain(self._gateway, request.request_id, self._caller(context))
        return pb.ExplainResponse(json=None if told is None else json.dumps(told))

    @_errors_told
    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        """Return the tokens of a text."""
        model = self._model(request.model, context)
        tokens = await _inline_or_not(
            len(request.text), lambda: model.tokenizer.encode(request.text)
        )
        return pb.TokenizeResponse(token_ids=tokens, max_model_len=model.max_model_len)

    @_errors_told
    async def Detokenize(
        self, request: pb.DetokenizeRequest, context: Context
    ) -> pb.DetokenizeResponse:
        """Return the text of tokens."""
        model = self._model(request.model, context)
        tokens = list(request.token_ids)
        for index, token in enumerate(tokens):
            check_token(f"token_ids[{index}]", token, model.tokenizer)
        text = await _inline_or_not(
            len(tokens), lambda: model.tokenizer.decode(tokens, skip_special_tokens=False)
        )
        return pb.DetokenizeResponse(text=text)

    def _model(self, name: str, context: Context) -> ServedModel:
        """Return the model of that name, if the caller may use it; raises UnknownModel."""
        return self._gateway.model(self._caller(context), name or None)

    @_errors_told
    async def ListModels(
        self, request: pb.ListModelsRequest, context: Context
    ) -> pb.ListModelsResponse:
        """List the models that the caller may use, by all of their names."""
        caller = self._caller(context)
        rows = []
        for name, lane in self._gateway.models.listed(caller):
            row = pb.Model(id=name, root=lane.front.name)
            with contextlib.suppress(Unavailable):  # its first instance has yet to come
                row.max_model_len = lane.served(caller).max_model_len
            rows.append(row)
        return pb.ListModelsResponse(models=rows)


class InferenceServer:
    """The service on its port."""

    def __init__(
        self,
        server: grpc.aio.Server,
        address: str,
        servicer: health.aio.HealthServicer,
        service: InferenceService,
    ) -> None:
        self.address = address
        """host:port, with the port that was really taken."""
        self._server = server
        self._health = servicer
        self._service = service

    @classmethod
    async def start(cls, gateway: Gateway) -> "InferenceServer":
        """Listen where the gateway's config says; raises InvalidConfig if the port is in use."""
        host, port = gateway.config.host, gateway.config.grpc_port
        limits = gateway.config.limits
        senders = SlowSenders(limits.body_timeout_s, gateway.metrics)
        server = grpc.aio.server(interceptors=(senders,), options=_options(limits))
        service = InferenceService(gateway)
        pb_grpc.add_InferenceServicer_to_server(service, server)
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
        return cls(server, f"{host}:{bound}", servicer, service)

    async def close(self, grace_s: float = 1.0) -> None:
        """Refuse new calls, give open ones `grace_s` seconds, then end them."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)
        await self._service.close()
