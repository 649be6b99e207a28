"""TLS for gRPC: servers take new certificates without a restart, channels when they are opened."""

import grpc

from baton.core.config import ClusterTlsConfig, TlsConfig
from baton.core.tls_files import TlsFiles, WatchedTls, read_tls


def server_credentials(config: TlsConfig) -> grpc.ServerCredentials:
    """Return what a server shows and asks; the files are looked at again for each new connection.

    Raises InvalidConfig if they are not what they should be.
    """
    watched = WatchedTls(config)

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        return _configuration(watched.files) if watched.changed() else None

    return grpc.dynamic_ssl_server_credentials(
        _configuration(watched.files),
        fetch,  # type: ignore[arg-type]  # the stubs do not know that None stands for no change
        require_client_authentication=config.client_ca is not None,
    )


def _configuration(files: TlsFiles) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(files.key, files.cert)], files.client_ca)


def channel_credentials(config: ClusterTlsConfig) -> grpc.ChannelCredentials:
    """Return what one of Baton's processes shows another, from the files as they are now."""
    files = read_tls(config.server)
    return grpc.ssl_channel_credentials(files.client_ca, files.key, files.cert)


def listen(server: grpc.aio.Server, address: str, tls: TlsConfig | None) -> int:
    """Let a server listen at host:port; return the port, or 0 if it cannot be had."""
    credentials = None if tls is None else server_credentials(tls)
    try:
        if credentials is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, credentials)
    except RuntimeError:
        return 0
