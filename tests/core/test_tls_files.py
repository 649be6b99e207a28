import shutil
import ssl
from pathlib import Path

import pytest

from baton.cli.certs import write_certs
from baton.core.config import TlsConfig
from baton.core.errors import InvalidConfig
from baton.core.tls_files import WatchedTls, read_tls, server_context


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_certs(tmp_path)
    return tmp_path


def config(folder: Path, *, ca: bool = False) -> TlsConfig:
    return TlsConfig(
        cert=folder / "server.pem",
        key=folder / "server.key",
        client_ca=folder / "ca.pem" if ca else None,
    )


def test_clients_are_asked_only_if_there_is_an_authority_for_them(folder):
    assert server_context(config(folder)).verify_mode is ssl.CERT_NONE
    asks = server_context(config(folder, ca=True))
    assert asks.verify_mode is ssl.CERT_REQUIRED
    assert asks.minimum_version >= ssl.TLSVersion.TLSv1_2


@pytest.mark.parametrize(
    ("name", "field"),
    [("server.pem", "tls.cert"), ("server.key", "tls.key"), ("ca.pem", "tls.client_ca")],
)
def test_a_file_that_is_missing_or_bad_is_named(folder, name, field):
    (folder / name).unlink()
    with pytest.raises(InvalidConfig, match="No such file") as refused:
        server_context(config(folder, ca=True))
    assert refused.value.field == field
    (folder / name).write_text("no certificate")
    with pytest.raises(InvalidConfig, match="PEM"):
        server_context(config(folder, ca=True))


def test_a_key_of_another_certificate_is_refused(folder):
    shutil.copy(folder / "client.key", folder / "server.key")
    with pytest.raises(InvalidConfig, match=r"server\.key its key"):
        server_context(config(folder))


def test_the_key_is_not_shown(folder):
    assert "PRIVATE" not in repr(read_tls(config(folder)))


def test_changed_files_are_told_once_and_bad_ones_never(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    write_certs(other)
    watched = WatchedTls(config(folder))
    before = watched.files
    assert not watched.changed()
    shutil.copy(other / "server.pem", folder / "server.pem")
    assert not watched.changed(), "half of the pair is exchanged"
    assert watched.files == before
    shutil.copy(other / "server.key", folder / "server.key")
    assert watched.changed()
    assert watched.files == read_tls(config(other))
    context = watched.context
    assert not watched.changed()
    (folder / "server.key").unlink()
    assert not watched.changed()
    assert watched.context is context
