"""Certificates and keys on disk, which may be exchanged for new ones at any time."""

import ssl
import threading
from dataclasses import dataclass, field
from pathlib import Path

from baton.core.config import TlsConfig
from baton.core.errors import InvalidConfig
from baton.core.log import get_logger

_log = get_logger("tls")


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """What the files of a TlsConfig held at one moment, in PEM."""

    cert: bytes
    key: bytes = field(repr=False)
    client_ca: bytes | None


def read_tls(config: TlsConfig) -> TlsFiles:
    """Read the files; raises InvalidConfig for one that cannot be read."""
    ca = config.client_ca
    return TlsFiles(
        _read("tls.cert", config.cert),
        _read("tls.key", config.key),
        None if ca is None else _read("tls.client_ca", ca),
    )


def server_context(config: TlsConfig) -> ssl.SSLContext:
    """Return a context for servers; raises InvalidConfig if a file is not what it should be."""
    read_tls(config)  # the library does not say which file it could not read
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        # A password would be asked for on the terminal; there may be nobody there.
        context.load_cert_chain(config.cert, config.key, password=_no_password)
    except (ssl.SSLError, ValueError) as error:
        allowed = f"a certificate in PEM, and in {config.key} its key, not encrypted ({error})"
        raise InvalidConfig("tls.cert", str(config.cert), allowed) from None
    if config.client_ca is None:
        return context
    try:
        context.load_verify_locations(config.client_ca)
    except ssl.SSLError as error:
        allowed = f"certificates of authorities in PEM ({error})"
        raise InvalidConfig("tls.client_ca", str(config.client_ca), allowed) from None
    context.verify_mode = ssl.CERT_REQUIRED
    return context


class WatchedTls:
    """The files of a TlsConfig, told anew each time that they have changed for good ones.

    Any thread may ask: gRPC does from its own. Raises InvalidConfig if they are not good at first.
    """

    def __init__(self, config: TlsConfig) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._complaint = ""
        self.files = read_tls(config)
        """The last good ones."""
        self.context = server_context(config)
        """Of the last good ones."""

    def changed(self) -> bool:
        """Return whether there are other good files than before; bad ones are told in the log."""
        with self._lock:
            try:
                found = read_tls(self._config)
                if found == self.files:
                    return False
                context = server_context(self._config)
                if read_tls(self._config) != found:
                    return False  # they are just being exchanged: next time
            except InvalidConfig as error:
                if str(error) != self._complaint:
                    self._complaint = str(error)
                    _log.error("new certificates are not used", reason=str(error))
                return False
            self.files, self.context, self._complaint = found, context, ""
            _log.info("new certificates", cert=str(self._config.cert))
            return True


def _read(name: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        allowed = f"a file that can be read ({error.strerror})"
        raise InvalidConfig(name, str(path), allowed) from None


def _no_password() -> str:
    raise ValueError("the key is encrypted")
