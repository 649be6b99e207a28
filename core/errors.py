"""Everything that Baton raises on purpose.

    BatonError
    ├── InvalidRequest        the caller must change the request
    │   └── UnknownModel      … to a model that is served here
    ├── Unauthenticated       the caller must bring an API key that is known
    ├── Forbidden             … or another one: this key may not do that
    ├── InvalidConfig         Baton refuses to start; change the setting
    ├── Overloaded            come back after `retry_after_s`
    ├── Unavailable           no instance can take the request now; try again
    │   ├── InstanceLost      the instance that owned the request is gone; try again
    │   │   └── RankLost      … because one of its ranks is gone or did not keep up
    │   └── Draining          the instance is about to leave; another takes the request at once
    ├── DeadlineExceeded      it took longer than allowed; try again or allow more
    ├── Cancelled             the caller asked for it
    ├── HandoverError         never seen by users: the owner tries another way
    │   ├── TransportError    a read failed
    │   │   └── PeerLost      … because the other process is gone or was removed
    │   ├── WrongKV           the digest of what arrived is not the digest that was offered
    │   ├── StaleReference    a block was freed after the reference to it was made
    │   └── Incompatible      the two sides do not run the same model in the same layout
    └── InternalError         a bug in Baton; the log has the trace

Each class has one stable `code`, shared by HTTP, gRPC and metrics, and one HTTP status; the gRPC
status follows from the code by the table in proto/errors.py.
"""

from typing import Any, ClassVar

_SHOWN = 120


def show(value: object) -> str:
    """Return `value` as an error message may show it: its repr, cut to a line."""
    text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


class BatonError(Exception):
    """The root of the tree."""

    code: ClassVar[str] = "internal"
    http_status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False

    @property
    def message(self) -> str:
        """What happened, in one sentence."""
        return str(self)


class _FieldError(BatonError):
    """A value that is not allowed: names the field, the value and what is allowed."""

    def __init__(self, field: str, value: object, allowed: str) -> None:
        super().__init__(f"{field}: {show(value)} is not allowed; allowed: {allowed}")
        self.field = field
        self.value = value
        self.allowed = allowed

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.field, self.value, self.allowed)


class InvalidRequest(_FieldError):
    code = "invalid_request"
    http_status = 400


class UnknownModel(InvalidRequest):
    code = "model_not_found"
    http_status = 404


class Unauthenticated(BatonError):
    code = "invalid_api_key"
    http_status = 401


class Forbidden(BatonError):
    code = "forbidden"
    http_status = 403


class InvalidConfig(_FieldError):
    code = "invalid_config"
    http_status = 500


class Overloaded(BatonError):
    code = "overloaded"
    http_status = 429
    retryable = True

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.retry_after_s)


class Unavailable(BatonError):
    code = "unavailable"
    http_status = 503
    retryable = True


class InstanceLost(Unavailable):
    code = "instance_lost"


class RankLost(InstanceLost):
    code = "rank_lost"


class Draining(Unavailable):
    code = "draining"


class DeadlineExceeded(BatonError):
    code = "deadline_exceeded"
    http_status = 504
    retryable = True


class Cancelled(BatonError):
    code = "cancelled"
    http_status = 499


class HandoverError(BatonError):
    code = "handover_failed"
    http_status = 503
    retryable = True


class TransportError(HandoverError):
    code = "transport_failed"


class PeerLost(TransportError):
    code = "peer_lost"


class WrongKV(HandoverError):
    code = "wrong_kv"


class StaleReference(HandoverError):
    code = "stale_reference"


class Incompatible(HandoverError):
    code = "incompatible"


class InternalError(BatonError):
    code = "internal"


def all_errors() -> dict[str, type[BatonError]]:
    """Return every concrete error class by its code.

    That is, of those in this module: Ray, for one, makes subclasses as it goes of whatever a call
    to an actor raises.
    """
    found: dict[str, type[BatonError]] = {}
    todo: list[type[BatonError]] = list(BatonError.__subclasses__())
    while todo:
        cls = todo.pop()
        todo += cls.__subclasses__()
        if cls.__module__ == __name__ and not cls.__name__.startswith("_"):
            assert found.get(cls.code, cls) is cls, f"code {cls.code} is used twice"
            found[cls.code] = cls
    return found
