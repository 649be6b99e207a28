"""The way from one gateway to another: through Ray, which knows them all by name.

It is for questions that somebody asks now and then, and not for requests or their tokens. Gateways
need no address, certificate or key of each other for it, and none has to know who else is there.
"""

import asyncio
import re
from typing import Any

from baton.api.peers import Ended
from baton.cluster import ray_calls
from baton.core.errors import DeadlineExceeded, InstanceLost, Overloaded, Unavailable
from baton.core.tenants import Caller
from baton.core.trace import RequestTrace

_FIND_TIMEOUT_S = 5.0
_ASK_TIMEOUT_S = 5.0
_AT_ONCE = 4
"""Questions under way; more are refused, as Ray is no place to queue what users send."""
_RETRY_S = 1.0
_NAME = re.compile(r"gateway-[0-9]{1,6}\.[0-9]{1,9}")
"""As gateway_keeper.py names them: nobody reaches another actor by what a request's id says."""


class GatewayPeers:
    """Asks other gateways; see api/peers.py."""

    def __init__(self, name: str) -> None:
        """`name` is what Ray calls this gateway's actor."""
        self.name = name
        self._places = asyncio.Semaphore(_AT_ONCE)

    def __repr__(self) -> str:
        return f"GatewayPeers({self.name})"

    async def cancel(self, gateway: str, request_id: str, caller: Caller) -> Ended:
        """End requests at another gateway."""
        found: Ended | None = await self._ask(gateway, "cancel", request_id, caller)
        return Ended(0, 0) if found is None else found

    async def explain(self, gateway: str, request_id: str, caller: Caller) -> dict[str, Any] | None:
        """Return why a request of another gateway went where it did."""
        found: dict[str, Any] | None = await self._ask(gateway, "explain", request_id, caller)
        return found

    async def trace(self, gateway: str, request_id: str, caller: Caller) -> RequestTrace | None:
        """Return the trace of a request that another gateway had."""
        found: RequestTrace | None = await self._ask(gateway, "trace", request_id, caller)
        return found

    async def _ask(self, gateway: str, question: str, request_id: str, caller: Caller) -> Any:
        """Return the answer; None if there is no such gateway, which then has no requests.

        Raises Overloaded if too many ask, and Unavailable if there is no answer.
        """
        if not _NAME.fullmatch(gateway):
            return None
        if self._places.locked():
            raise Overloaded("too many ask for requests of other gateways", _RETRY_S)
        async with self._places:
            try:
                actor = await ray_calls.find_actor(gateway, _FIND_TIMEOUT_S)
                return await ray_calls.call(
                    actor, "answer", question, request_id, caller, timeout_s=_ASK_TIMEOUT_S
                )
            except InstanceLost:
                return None
            except (DeadlineExceeded, Unavailable) as error:
                told = f"{gateway}, which has the request, cannot be asked: {error.message}"
                raise Unavailable(told) from None
