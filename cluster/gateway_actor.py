"""The process of one gateway. Ray starts it again whenever it ends.

It has no async methods: Ray would run the others on one event loop then, not in the main thread.
"""

import threading
from pathlib import Path
from typing import Any

from baton.cluster.actor_process import (
    LoopThread,
    leave_on_sigterm,
    or_exit,
    sigterm_drain_s,
    write_output_to,
)
from baton.cluster.gateway_host import GatewayHost
from baton.cluster.gateway_peers import GatewayPeers
from baton.cluster.status import GatewayInfo, GatewayPlan
from baton.core import log
from baton.core.tenants import Caller

CALLS_AT_ONCE = 8
_CLOSE_S = 8.0
"""For the gateway to close after SIGTERM, once it has drained."""


class GatewayActor:
    """Hosts one gateway, from its construction to `close`."""

    def __init__(self, plan: GatewayPlan, log_path: Path, actor: str) -> None:
        """`actor` is its name in Ray."""
        write_output_to(log_path)
        log.configure()
        self._tried = threading.Event()
        """It listens, or was kept from it."""
        self._host = GatewayHost(plan, self._tried.set, GatewayPeers(actor))
        self._loop = LoopThread("gateway-loop")
        self._loop.end_process_if_it_stands_still()
        self._serving = self._loop.run(or_exit(self._host.serve()))
        within_s = sigterm_drain_s()
        leave_on_sigterm(lambda: self.close(within_s), within_s + _CLOSE_S)

    def info(self) -> GatewayInfo:
        """Wait until it listens, and return where; raises what kept it from doing so."""
        self._tried.wait()
        found: GatewayInfo = self._loop.run(self._host.info()).result()
        return found

    def answer(self, question: str, request_id: str, caller: Caller) -> Any:
        """Answer another gateway about a request of this one; see GatewayHost.answer."""
        return self._loop.run(self._host.answer(question, request_id, caller)).result()

    def close(self, drain_s: float) -> None:
        """Take no new requests, give those that are open `drain_s` seconds, and close."""
        self._loop.run(self._host.stop(drain_s)).result()
        self._serving.result()
