"""Questions about a request that any gateway answers, whichever of them has the request.

A request's id names the gateway that has it (request_names.py), so nobody has to search or to keep
books: a question goes on to that gateway, once, with the caller as this one knows it. Nothing of
this is on the way of a request's tokens.
"""

from typing import Any

from baton.api.gateway import Gateway
from baton.api.peers import Ended
from baton.api.request_names import gateway_of
from baton.core.tenants import Caller
from baton.core.trace import RequestTrace


def _other(gateway: Gateway, request_id: str) -> str:
    """Return the name of the gateway that has a request; "" if it is this one, or nobody's."""
    owner = gateway_of(request_id)
    return "" if owner == gateway.peers.name else owner


async def cancel(gateway: Gateway, request_id: str, caller: Caller) -> Ended:
    """End open requests of that id, or of the call of that id, at whichever gateway has them."""
    if other := _other(gateway, request_id):
        return await gateway.peers.cancel(other, request_id, caller)
    return gateway.cancel(request_id, caller)


async def explain(gateway: Gateway, request_id: str, caller: Caller) -> dict[str, Any] | None:
    """Return why a request went where it did, from whichever gateway has sent it there."""
    if other := _other(gateway, request_id):
        return await gateway.peers.explain(other, request_id, caller)
    return gateway.explain(request_id, caller)


async def trace(gateway: Gateway, request_id: str, caller: Caller) -> RequestTrace | None:
    """Return the trace of a request that ended lately, from whichever gateway had it."""
    if other := _other(gateway, request_id):
        return await gateway.peers.trace(other, request_id, caller)
    return gateway.trace(request_id, caller)
