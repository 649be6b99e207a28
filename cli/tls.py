"""Options about certificates, as configs."""

from pathlib import Path

from baton.core.config import ClusterTlsConfig, TlsConfig
from baton.core.errors import InvalidConfig


def tls_of(cert: Path | None, key: Path | None, client_ca: Path | None) -> TlsConfig | None:
    """Return the APIs' side of TLS; None if no option asks for it, InvalidConfig if one lacks."""
    if cert is None and key is None and client_ca is None:
        return None
    if cert is None:
        raise InvalidConfig("--tls-cert", None, "a file: TLS needs certificate and key")
    if key is None:
        raise InvalidConfig("--tls-key", None, "a file: TLS needs certificate and key")
    return TlsConfig(cert=cert, key=key, client_ca=client_ca)


def cluster_tls(folder: Path | None) -> ClusterTlsConfig | None:
    """Return what Baton's processes show each other: files named as `baton certs` names them."""
    if folder is None:
        return None
    folder = folder.absolute()  # instances may run in another folder
    return ClusterTlsConfig(
        cert=folder / "cluster.pem", key=folder / "cluster.key", ca=folder / "cluster-ca.pem"
    )
