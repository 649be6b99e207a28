"""What every HTTP call meets first: is its head small enough, and whose is it?"""

from starlette.types import ASGIApp, Receive, Scope, Send

from baton.api.gateway import Gateway
from baton.api.http.errors import error_response, http_error_response
from baton.api.identity import require_admin
from baton.core import log
from baton.core.errors import BatonError
from baton.core.tenants import Caller

_OPEN = frozenset({"/health"})
"""Paths for everybody: whoever watches over the process has no key."""
_CONSOLE = "/console"
"""Open with all below it: its files hold no data, and its calls bring a key."""
_METRICS = "/metrics"
_ADMIN = frozenset({_METRICS, "/v1/status"})
"""Paths that tell of all tenants."""


class Edge:
    """ASGI middleware: a call whose caller is not known goes no further, whatever its path is.

    What comes through has its Caller in `request.state.caller`.
    """

    def __init__(self, app: ASGIApp, gateway: Gateway) -> None:
        self._app = app
        self._gateway = gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI request."""
        assert scope["type"] == "http", "there are no web sockets, and no lifespan"
        most = self._gateway.config.limits.max_header_bytes
        if sum(len(name) + len(value) for name, value in scope["headers"]) > most:
            response = http_error_response(431, f"the headers are larger than {most} bytes")
            await response(scope, receive, send)
            return
        if self._is_open(scope["path"]):
            await self._app(scope, receive, send)
            return
        try:
            caller = self._caller(scope)
        except BatonError as error:
            self._gateway.metrics.refused(error.code)
            await error_response(error)(scope, receive, send)
            return
        scope.setdefault("state", {})["caller"] = caller
        with log.bound(tenant=caller.tenant.name, key=caller.key_id):
            await self._app(scope, receive, send)

    def _is_open(self, path: str) -> bool:
        if path in _OPEN or path == _CONSOLE or path.startswith(f"{_CONSOLE}/"):
            return True
        return path == _METRICS and self._gateway.config.open_metrics

    def _caller(self, scope: Scope) -> Caller:
        values = [value for name, value in scope["headers"] if name == b"authorization"]
        header = values[0].decode("latin-1") if len(values) == 1 else None
        caller = self._gateway.identity.caller(header)
        if scope["path"] in _ADMIN:
            require_admin(caller, scope["path"])
        return caller
