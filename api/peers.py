"""The way from one gateway to the others, for questions about requests that they have."""

from dataclasses import dataclass
from typing import Any, Protocol

from baton.core.tenants import Caller
from baton.core.trace import RequestTrace


@dataclass(frozen=True, slots=True)
class Ended:
    """How many requests were ended because somebody asked for it."""

    requests: int
    """Each choice of a call counts."""
    waiting: int
    """Of these, those that still waited for their turn: nothing was computed for them."""


class Peers(Protocol):
    """The way to the other gateways of a cluster; each answers by what it has itself.

    All raise BatonError if the gateway of that name is there and cannot be asked.
    """

    name: str
    """What they call this one; "": there are no others."""

    async def cancel(self, gateway: str, request_id: str, caller: Caller) -> Ended:
        """Do as Gateway.cancel does, at `gateway`; nothing is ended if there is none any more."""
        ...

    async def explain(self, gateway: str, request_id: str, caller: Caller) -> dict[str, Any] | None:
        """Return what Gateway.explain returns, at `gateway`; None also if there is none."""
        ...

    async def trace(self, gateway: str, request_id: str, caller: Caller) -> RequestTrace | None:
        """Return what Gateway.trace returns, at `gateway`; None also if there is none."""
        ...


class _Alone:
    """There are no others."""

    name = ""

    async def cancel(self, gateway: str, request_id: str, caller: Caller) -> Ended:
        return Ended(0, 0)

    async def explain(self, gateway: str, request_id: str, caller: Caller) -> dict[str, Any] | None:
        return None

    async def trace(self, gateway: str, request_id: str, caller: Caller) -> RequestTrace | None:
        return None


ALONE: Peers = _Alone()
