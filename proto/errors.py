"""Baton's errors as gRPC statuses, and back.

Many codes share one status, so the status message opens with the code: `overloaded: 256 requests
are open`. A foreign error (grpc's own, a proxy's) has no such opening and follows from its status.
"""

import re

import grpc
from google.protobuf.message import DecodeError

from baton.core.errors import (
    BatonError,
    InternalError,
    InvalidConfig,
    InvalidRequest,
    Overloaded,
    all_errors,
)
from baton.proto import inference_pb2 as pb

MalformedMessage = DecodeError
"""What reading a stream raises for bytes that are no message of its type."""

STATUS = {
    "invalid_request": grpc.StatusCode.INVALID_ARGUMENT,
    "model_not_found": grpc.StatusCode.NOT_FOUND,
    "invalid_api_key": grpc.StatusCode.UNAUTHENTICATED,
    "forbidden": grpc.StatusCode.PERMISSION_DENIED,
    "invalid_config": grpc.StatusCode.FAILED_PRECONDITION,
    "overloaded": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "unavailable": grpc.StatusCode.UNAVAILABLE,
    "instance_lost": grpc.StatusCode.UNAVAILABLE,
    "rank_lost": grpc.StatusCode.UNAVAILABLE,
    "draining": grpc.StatusCode.UNAVAILABLE,
    "deadline_exceeded": grpc.StatusCode.DEADLINE_EXCEEDED,
    "cancelled": grpc.StatusCode.CANCELLED,
    "handover_failed": grpc.StatusCode.UNAVAILABLE,
    "transport_failed": grpc.StatusCode.UNAVAILABLE,
    "peer_lost": grpc.StatusCode.UNAVAILABLE,
    "wrong_kv": grpc.StatusCode.DATA_LOSS,
    "stale_reference": grpc.StatusCode.ABORTED,
    "incompatible": grpc.StatusCode.FAILED_PRECONDITION,
    "internal": grpc.StatusCode.INTERNAL,
}
"""The status of every error code."""

_FOREIGN = {
    grpc.StatusCode.CANCELLED: "cancelled",
    grpc.StatusCode.DEADLINE_EXCEEDED: "deadline_exceeded",
    grpc.StatusCode.RESOURCE_EXHAUSTED: "overloaded",
    grpc.StatusCode.UNAVAILABLE: "unavailable",
}
"""The code of an error that Baton did not raise; all other statuses are internal errors."""

_FIELD_MESSAGE = re.compile(r"([^:]+): (.*?) is not allowed; allowed: (.*)", re.DOTALL)


class _Shown(str):
    """A value that arrived as the text which an error message showed of it."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def error_of(code: str, message: str) -> BatonError:
    """Return the error that another process raised; its text is `message`.

    A code that this version does not know gives an InternalError that names it.
    """
    cls = all_errors().get(code)
    if cls is None:
        return InternalError(f"error of unknown code {code!r}: {message}")
    if not issubclass(cls, (InvalidRequest, InvalidConfig)):
        return cls(message)
    match = _FIELD_MESSAGE.fullmatch(message)
    if match is None:
        return InternalError(f"{code}: {message}")
    field, value, allowed = match.groups()
    return cls(field, _Shown(value), allowed)


def to_status(error: BatonError) -> tuple[grpc.StatusCode, str]:
    """Return the status and the message with which a gRPC service ends a call."""
    return STATUS[error.code], f"{error.code}: {error.message}"


PUSHBACK = "grpc-retry-pushback-ms"
"""Trailing metadata that says when to come back; gRPC's own name, of its proposal A6."""


def trailing_metadata(error: BatonError) -> tuple[tuple[str, str], ...]:
    """Return what a gRPC service sends beside the status, for those who try again."""
    if not isinstance(error, Overloaded):
        return ()
    return ((PUSHBACK, str(_milliseconds(error))),)


def _milliseconds(error: Overloaded) -> int:
    return max(0, round(1000 * error.retry_after_s))


def error_message(error: BatonError) -> pb.Error:
    """Return an error as one request of a batch has it."""
    message = pb.Error(code=error.code, message=error.message)
    if isinstance(error, Overloaded):
        message.retry_after_ms = _milliseconds(error)
    return message


def from_error_message(message: pb.Error) -> BatonError:
    """Return the error of one request of a batch; the inverse of `error_message`."""
    error = error_of(message.code, message.message)
    if isinstance(error, Overloaded) and message.HasField("retry_after_ms"):
        error.retry_after_s = message.retry_after_ms / 1000
    return error


def from_rpc_error(error: grpc.aio.AioRpcError) -> BatonError:
    """Return what a failed call means; the inverse of `to_status` where the peer is Baton."""
    details = error.details() or ""
    code, colon, message = details.partition(": ")
    if colon and STATUS.get(code) is error.code():
        found = error_of(code, message)
        if isinstance(found, Overloaded):
            found.retry_after_s = _pushback(error, found.retry_after_s)
        return found
    return error_of(_FOREIGN.get(error.code(), "internal"), f"{error.code().name}: {details}")


def _pushback(error: grpc.aio.AioRpcError, default: float) -> float:
    """Return after how many seconds to come back, if the trailing metadata says it."""
    for name, value in error.trailing_metadata() or ():
        if name == PUSHBACK and str(value).isdecimal():
            return int(value) / 1000
    return default
