"""How Baton's own processes open gRPC servers and channels: bounds, keepalive, health."""

from collections.abc import Callable

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from baton.core.config import ClusterTlsConfig
from baton.core.errors import InvalidConfig
from baton.proto.grpc_tls import channel_credentials, listen

_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_send_message_length", 64 << 20),
    # A peer that hangs or is cut off is noticed within 4 s, although its kernel still answers.
    ("grpc.keepalive_time_ms", 2_000),
    ("grpc.keepalive_timeout_ms", 2_000),
    ("grpc.http2.ping_timeout_ms", 2_000),
    # A proxy of the environment is for the way out, and would break calls between instances.
    ("grpc.enable_http_proxy", 0),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 1_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    ("grpc.http2.max_ping_strikes", 0),
)

CHANNEL_OPTIONS = (*_OPTIONS, ("grpc.enable_retries", 0), ("grpc.use_local_subchannel_pool", 1))
"""For channels between instances: a broken stream is told at once, never repeated in silence."""

SERVER_OPTIONS = (*_OPTIONS, ("grpc.so_reuseport", 0))
"""Without SO_REUSEPORT, so that a port in use is an error and not a shared port."""


def open_channel(address: str, tls: ClusterTlsConfig | None = None) -> grpc.aio.Channel:
    """Return a channel to another of Baton's processes at host:port.

    With `tls` both show certificates. Addresses come and go, so it is not the address that the
    other's certificate must name but `tls.name`.
    """
    if tls is None:
        return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
    named = ("grpc.ssl_target_name_override", tls.name)
    options = (*CHANNEL_OPTIONS, named)
    return grpc.aio.secure_channel(address, channel_credentials(tls), options=options)


class WorkerServer:
    """A gRPC server with the health service, bound to one port."""

    def __init__(self, server: grpc.aio.Server, address: str, servicer: health.aio.HealthServicer):
        self.address = address
        """host:port, with the port that was really taken."""
        self._server = server
        self._health = servicer

    @classmethod
    async def start(
        cls,
        host: str,
        port: int,
        register: Callable[[grpc.aio.Server], None],
        tls: ClusterTlsConfig | None = None,
    ) -> "WorkerServer":
        """Serve what `register` adds, with `tls` only to those who have its certificates.

        Raises InvalidConfig if the port cannot be had, or a certificate is not as it should be.
        """
        server = grpc.aio.server(options=SERVER_OPTIONS)
        servicer = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
        register(server)
        bound = listen(server, f"{host}:{port}", None if tls is None else tls.server)
        if bound == 0:
            raise InvalidConfig("port", port, f"a port that is free on {host}")
        await server.start()
        started = cls(server, f"{host}:{bound}", servicer)
        await started.set_healthy(True)
        return started

    async def set_healthy(self, healthy: bool) -> None:
        """Answer health checks with SERVING or NOT_SERVING; calls are served either way."""
        status = health_pb2.HealthCheckResponse
        await self._health.set("", status.SERVING if healthy else status.NOT_SERVING)

    async def close(self, grace_s: float = 1.0) -> None:
        """Refuse new calls, give open ones `grace_s` seconds, then end them."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)
