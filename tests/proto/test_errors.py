import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.core.errors import (
    BatonError,
    Cancelled,
    DeadlineExceeded,
    InternalError,
    InvalidConfig,
    InvalidRequest,
    Overloaded,
    Unavailable,
    UnknownModel,
    all_errors,
)
from baton.proto.errors import STATUS, error_of, from_rpc_error, to_status


def rpc_error(status: grpc.StatusCode, details: str | None) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(status, grpc.aio.Metadata(), grpc.aio.Metadata(), details=details)


def example(cls: type[BatonError]) -> BatonError:
    if issubclass(cls, (InvalidRequest, InvalidConfig)):
        return cls("top_p", -1.5, "over 0, up to 1")
    return cls("it: went wrong")


def test_every_code_has_a_status_and_every_status_a_code():
    assert STATUS.keys() == all_errors().keys()


@pytest.mark.parametrize("cls", all_errors().values())
def test_every_error_survives_a_call(cls: type[BatonError]):
    error = example(cls)
    status, details = to_status(error)
    assert status is not grpc.StatusCode.OK
    back = from_rpc_error(rpc_error(status, details))
    assert type(back) is cls
    assert str(back) == str(error)


def test_retryable_errors_have_a_status_that_clients_retry():
    retried = {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.ABORTED,
    }
    users = {c: e for c, e in all_errors().items() if e.http_status != 503 or c == "unavailable"}
    for code, cls in users.items():
        assert (STATUS[code] in retried) == cls.retryable, code


@pytest.mark.parametrize(
    ("status", "cls"),
    [
        (grpc.StatusCode.UNAVAILABLE, Unavailable),
        (grpc.StatusCode.DEADLINE_EXCEEDED, DeadlineExceeded),
        (grpc.StatusCode.CANCELLED, Cancelled),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, Overloaded),
        (grpc.StatusCode.UNIMPLEMENTED, InternalError),
        (grpc.StatusCode.INVALID_ARGUMENT, InternalError),
        (grpc.StatusCode.UNKNOWN, InternalError),
    ],
)
@pytest.mark.parametrize("details", [None, "", "failed to connect: 127.0.0.1:1", "overloaded"])
def test_foreign_errors_follow_from_their_status(status, cls: type[BatonError], details: str):
    error = from_rpc_error(rpc_error(status, details))
    assert type(error) is cls
    assert status.name in str(error)
    assert (details or "") in str(error)


def test_a_code_under_another_status_is_not_believed():
    error = from_rpc_error(rpc_error(grpc.StatusCode.UNAVAILABLE, "invalid_request: x"))
    assert type(error) is Unavailable


@given(field=st.from_regex(r"[a-z_.]+", fullmatch=True), value=st.text(), allowed=st.text())
def test_a_refused_value_keeps_its_text(field: str, value: str, allowed: str):
    error = UnknownModel(field, value, allowed)
    back = error_of(error.code, error.message)
    assert str(back) == str(error)
    assert isinstance(back, UnknownModel)
    assert back.field == field


def test_the_parts_of_a_refusal_arrive():
    back = error_of("invalid_request", str(InvalidRequest("top_k", [1, 2], "0 or more")))
    assert isinstance(back, InvalidRequest)
    assert (back.field, str(back.value), back.allowed) == ("top_k", "[1, 2]", "0 or more")


def test_what_no_version_of_baton_says_is_an_internal_error():
    assert type(error_of("made_up", "hm")) is InternalError
    assert "made_up" in str(error_of("made_up", "hm"))
    assert str(error_of("invalid_request", "no field here")) == "invalid_request: no field here"
    assert type(error_of("invalid_request", "no field here")) is InternalError
