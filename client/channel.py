"""How a client reaches its gateway."""

from dataclasses import dataclass
from pathlib import Path

import grpc

from baton.core.errors import InvalidConfig

OPTIONS = (
    # A proxy of the environment is for the way out.
    ("grpc.enable_http_proxy", 0),
    # The client's own retries know Baton's errors, and keep a budget over all requests.
    ("grpc.enable_retries", 0),
    ("grpc.max_receive_message_length", 64 << 20),
    # A gateway that is cut off is noticed within half a minute; it allows a ping every 5 s.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
)
REQUEST_ID = "x-request-id"
"""Initial metadata that names a request."""


@dataclass(frozen=True, slots=True)
class ClientTls:
    """How a client knows its server, and what it shows; PEM files."""

    ca: Path
    """The authority of the server's certificate."""
    cert: Path | None = None
    """The client's own certificate, if the server asks for one."""
    key: Path | None = None
    """The private key to it."""

    def credentials(self) -> grpc.ChannelCredentials:
        """Read the files; raises InvalidConfig that names one which cannot be read."""
        if (self.cert is None) != (self.key is None):
            raise InvalidConfig("cert", self.cert, "certificate and key, or neither")
        return grpc.ssl_channel_credentials(
            _read("ca", self.ca), _read("key", self.key), _read("cert", self.cert)
        )


def _read(name: str, path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        return path.read_bytes()
    except OSError as error:
        allowed = f"a file that can be read ({error.strerror})"
        raise InvalidConfig(name, str(path), allowed) from None


def metadata_of(api_key: str) -> tuple[tuple[str, str], ...]:
    """Return what goes with every call."""
    return (("authorization", f"Bearer {api_key}"),) if api_key else ()


def compression_of(compress: bool) -> grpc.Compression:
    """Return how requests are sent; answers are small and come as they are."""
    return grpc.Compression.Gzip if compress else grpc.Compression.NoCompression
