"""HTTPS, TLS for gRPC, and certificates that are exchanged while it runs."""

import asyncio
import shutil
import ssl
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from baton.api import serve
from baton.api.serve import FrontDoor
from baton.cli.certs import write_certs
from baton.client import Client, ClientTls, Options
from baton.core.config import TlsConfig
from baton.core.errors import BatonError, InvalidConfig, Unavailable

SOON = 60


@pytest.fixture(scope="session")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certs")
    write_certs(folder)
    return folder


def tls(folder: Path, *, asks: bool = False) -> TlsConfig:
    ca = folder / "ca.pem" if asks else None
    return TlsConfig(cert=folder / "server.pem", key=folder / "server.key", client_ca=ca)


def context(folder: Path, *, shows: str = "") -> ssl.SSLContext:
    made = ssl.create_default_context(cafile=folder / "ca.pem")
    if shows:
        made.load_cert_chain(folder / f"{shows}.pem", folder / f"{shows}.key")
    return made


async def models(door: FrontDoor, verify: ssl.SSLContext) -> int:
    async with httpx.AsyncClient(base_url=door.http_url, verify=verify, timeout=SOON) as http:
        return (await http.get("/v1/models")).status_code


async def generated(door: FrontDoor, tls: ClientTls | None) -> str:
    def use() -> str:
        with Client(door.grpc_address, timeout_s=SOON, tls=tls) as client:
            return "".join(client.generate("hi", Options(max_tokens=3)))

    return await asyncio.to_thread(use)


async def test_both_apis_speak_tls_and_nothing_else(make_front_door, certs):
    door = await make_front_door(tls=tls(certs))
    assert door.http_url.startswith("https://")
    assert await models(door, context(certs)) == 200
    assert await generated(door, ClientTls(certs / "ca.pem"))
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        await models(door, ssl.create_default_context())
    async with httpx.AsyncClient(timeout=SOON) as http:
        with pytest.raises(httpx.RemoteProtocolError):
            await http.get(door.http_url.replace("https://", "http://"))
    with pytest.raises(Unavailable):
        await generated(door, None)


async def test_clients_must_show_a_certificate_if_asked(make_front_door, certs):
    door = await make_front_door(tls=tls(certs, asks=True))
    assert await models(door, context(certs, shows="client")) == 200
    # The cluster's authority is another: who is one of its processes is not thereby a user.
    for stranger in ("", "cluster"):
        with pytest.raises(httpx.TransportError):
            await models(door, context(certs, shows=stranger))
    mine = ClientTls(certs / "ca.pem", certs / "client.pem", certs / "client.key")
    assert await generated(door, mine)
    foreign = ClientTls(certs / "ca.pem", certs / "cluster.pem", certs / "cluster.key")
    for stranger_tls in (ClientTls(certs / "ca.pem"), foreign):
        with pytest.raises(BatonError):
            await generated(door, stranger_tls)


async def test_a_handshake_that_does_not_come_is_cut(make_front_door, certs):
    door = await make_front_door(tls=tls(certs), limits={"header_timeout_s": 0.2})
    parts = urlsplit(door.http_url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    async with asyncio.timeout(SOON):
        assert await reader.read() == b""
    writer.close()


async def shown(door: FrontDoor) -> str:
    """Return the certificate that a new connection is shown, also one that is then refused."""
    parts = urlsplit(door.http_url)
    anybody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    anybody.check_hostname, anybody.verify_mode = False, ssl.CERT_NONE
    _, writer = await asyncio.open_connection(parts.hostname, parts.port, ssl=anybody)
    found = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.transport.abort()
    return ssl.DER_cert_to_PEM_cert(found)


async def test_new_certificates_are_shown_to_new_connections(
    make_front_door, certs, tmp_path, tmp_path_factory, monkeypatch
):
    monkeypatch.setattr(serve, "_LOOK_S", 0.01)
    shutil.copytree(certs, tmp_path, dirs_exist_ok=True)
    other = tmp_path_factory.mktemp("other")
    write_certs(other)
    door = await make_front_door(tls=tls(tmp_path, asks=True))
    assert await models(door, context(certs, shows="client")) == 200
    for name in ("server.pem", "server.key", "ca.pem"):
        shutil.copy(other / name, tmp_path / name)
    wanted = (other / "server.pem").read_text()
    async with asyncio.timeout(SOON):
        while await shown(door) != wanted:
            pass
    assert await models(door, context(other, shows="client")) == 200
    mixed = context(other)
    mixed.load_cert_chain(certs / "client.pem", certs / "client.key")
    with pytest.raises(httpx.TransportError):
        await models(door, mixed)  # the authority of before is none any more
    mine = ClientTls(other / "ca.pem", other / "client.pem", other / "client.key")
    assert await generated(door, mine), "gRPC looks for itself"
    theirs = ClientTls(certs / "ca.pem", certs / "client.pem", certs / "client.key")
    with pytest.raises(BatonError):
        await generated(door, theirs)


@pytest.mark.parametrize("name", ["server.pem", "server.key"])
async def test_a_bad_certificate_is_refused_before_anything_listens(
    make_gateway, certs, tmp_path, name
):
    shutil.copytree(certs, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).write_text("no certificate")
    with pytest.raises(InvalidConfig, match="tls"):
        await FrontDoor.start(make_gateway(tls=tls(tmp_path)))


async def test_a_slow_reader_over_tls_is_cut(make_front_door, certs, leader, text_script, until):
    leader.script = text_script("word " * 300)
    door = await make_front_door(tls=tls(certs), limits={"reader_timeout_s": 1.0})
    parts = urlsplit(door.http_url)
    _, writer = await asyncio.open_connection(
        parts.hostname, parts.port, ssl=context(certs), limit=1 << 12
    )
    body = b'{"prompt":"hi","max_tokens":200,"stream":true,"ignore_eos":true,"logprobs":5,"n":64}'
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    writer.write(head + f"content-length: {len(body)}\r\n\r\n".encode() + body)
    writer.transport.pause_reading()
    await until(lambda: len(leader.submits) == 64)
    async with asyncio.timeout(SOON):
        await door.gateway.idle()
    await until(lambda: b'cut_total{reason="slow_reader"} 1.0' in door.gateway.metrics.render())
    writer.transport.abort()
