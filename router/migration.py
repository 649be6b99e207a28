"""Whether a request whose decode instance is gone may go on elsewhere, and until when.

Pure: what happened goes in, the error that ends the request comes out, or nothing: it goes on.

A lost instance counts as one migration. One that drains counts as none: it tells every request
once, and is not chosen again. One that is full is waited for, where a request has been let in
already: it must not be lost to a refusal.
"""

from baton.core.errors import BatonError, Draining, InstanceLost, Overloaded
from baton.router.load import InstanceKey


class Migrations:
    """Those of one request."""

    def __init__(self, *, limit: int, wait_s: float) -> None:
        """At most `limit` lost instances, and `wait_s` seconds without any that takes over."""
        self._limit = limit
        self._wait_s = wait_s
        self._lost = 0
        self._moving = False
        self.until: float | None = None
        """When to give up waiting for an instance; None while one serves the request."""
        self.avoided: set[InstanceKey] = set()
        """Instances that it was lost on: chosen last, and only once they are connected again."""

    def __repr__(self) -> str:
        return f"Migrations({self._lost} of {self._limit} lost, avoided={self.avoided})"

    def went_on(self) -> None:
        """Note that tokens have come: whoever sent them serves the request."""
        self.until = None

    def ended(self, key: InstanceKey, error: BatonError, now: float) -> BatonError | None:
        """Take the error with which an instance ended the request; None: it goes on elsewhere."""
        match error:
            case InstanceLost():
                if self._lost >= self._limit:
                    return self._spent(error)
                self._lost += 1
                self.avoided.add(key)
            case Draining():
                pass
            case Overloaded() if self._moving:
                self.avoided.add(key)
            case _:
                return error
        self._moving = True
        if self.until is None:
            self.until = now + self._wait_s
        return error if now >= self.until else None

    def _spent(self, error: InstanceLost) -> BatonError:
        if not self._limit:
            return error
        return InstanceLost(f"lost {self._lost + 1} times, which is too often; last: {error}")
