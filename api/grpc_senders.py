"""Clients of the gRPC API that begin a call and send its request slowly, never, or garbled."""

import asyncio
import functools
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn

import grpc

from baton.core.errors import BatonError, DeadlineExceeded, InvalidRequest
from baton.core.metrics import GatewayMetrics
from baton.proto.errors import MalformedMessage, to_status

Context = grpc.aio.ServicerContext[Any, Any]
Method = Callable[[Any, Context], Awaitable[Any]]
"""Takes one request."""
StreamMethod = Callable[[AsyncIterator[Any], Context], Awaitable[Any]]


class SlowSenders(grpc.aio.ServerInterceptor):
    """Ends calls whose one request is not there in time, or is no message at all.

    gRPC itself waits for a request for as long as its client pleases, and calls the method only
    then. On the wire one request is a stream of one, so methods are served as if they took a
    stream, and the wait for the first message has a deadline. A method that takes a stream, such as
    GenerateBatch, may hear nothing for as long as it likes.
    """

    def __init__(self, timeout_s: float, metrics: GatewayMetrics) -> None:
        """A request may take `timeout_s` seconds from its call's headers to its last byte."""
        self._timeout_s = timeout_s
        self._metrics = metrics

    def __repr__(self) -> str:
        return f"SlowSenders({self._timeout_s:g} s)"

    async def intercept_service(
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], Awaitable["grpc.RpcMethodHandler[Any, Any] | None"]
        ],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Any, Any] | None":
        """Return a handler that waits for the request itself."""
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming:  # None: no such method
            return handler
        method: Any = handler.unary_stream if handler.response_streaming else handler.unary_unary
        make: Any = grpc.stream_unary_rpc_method_handler
        if handler.response_streaming:
            make = grpc.stream_stream_rpc_method_handler
        made: grpc.RpcMethodHandler[Any, Any] = make(
            self._waiting(method),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )
        return made

    def _waiting(self, method: Method) -> StreamMethod:
        @functools.wraps(method)
        async def waiting(requests: AsyncIterator[Any], context: Context) -> Any:
            try:
                async with asyncio.timeout(self._timeout_s):
                    request = await anext(requests, None)
            except TimeoutError:
                self._metrics.cut("slow_sender")
                late = DeadlineExceeded(f"the request took longer than {self._timeout_s:g} s")
                await _abort(context, late)
            except MalformedMessage as error:
                await _abort(context, InvalidRequest("request", str(error), "a protobuf message"))
            if request is None:
                await context.abort(grpc.StatusCode.UNIMPLEMENTED, "a call without a request")
            return await method(request, context)

        return waiting


async def _abort(context: Context, error: BatonError) -> NoReturn:
    await context.abort(*to_status(error))
    raise error  # not reached: abort raises
