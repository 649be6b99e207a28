"""A client's options about certificates; apart from the server's, which need its libraries."""

from pathlib import Path

from baton.client.channel import ClientTls
from baton.core.errors import InvalidConfig


def client_tls(ca: Path | None, cert: Path | None, key: Path | None) -> ClientTls | None:
    """Return a client's side of TLS; None if no option asks for it, InvalidConfig if one lacks."""
    if ca is None and cert is None and key is None:
        return None
    if ca is None:
        raise InvalidConfig("--ca", None, "a file: the server must be known by its authority")
    if (cert is None) != (key is None):
        name = "--cert" if cert is None else "--key"
        raise InvalidConfig(name, None, "a file: a client shows certificate and key, or none")
    for name, path in (("--ca", ca), ("--cert", cert), ("--key", key)):
        if path is not None and not path.is_file():
            raise InvalidConfig(name, str(path), "a file")
    return ClientTls(ca, cert, key)
