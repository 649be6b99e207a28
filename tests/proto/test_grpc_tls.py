"""Mutual TLS between Baton's processes, on real sockets."""

import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton.cli.certs import write_certs
from baton.cli.tls import cluster_tls
from baton.core.config import ClusterTlsConfig
from baton.core.errors import InvalidConfig
from baton.proto.grpc_runtime import WorkerServer, open_channel

SOON = 30


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_certs(tmp_path)
    return tmp_path


@pytest.fixture
def tls(folder: Path) -> ClusterTlsConfig:
    found = cluster_tls(folder)
    assert found is not None
    return found


@pytest.fixture
async def server(tls: ClusterTlsConfig) -> AsyncIterator[WorkerServer]:
    started = await WorkerServer.start("127.0.0.1", 0, lambda _: None, tls)
    yield started
    await started.close(0)


async def status(channel: grpc.aio.Channel) -> grpc.StatusCode:
    """Return what comes of a call on a new channel."""
    async with channel:
        stub = health_pb2_grpc.HealthStub(channel)
        return await stub.Check(health_pb2.HealthCheckRequest(), timeout=SOON).code()


async def test_processes_of_one_cluster_talk(server, tls):
    assert await status(open_channel(server.address, tls)) is grpc.StatusCode.OK


async def test_who_shows_nothing_is_refused(server, folder):
    refused = grpc.StatusCode.UNAVAILABLE
    assert await status(open_channel(server.address)) is refused, "no TLS at all"
    credentials = grpc.ssl_channel_credentials((folder / "cluster-ca.pem").read_bytes())
    named = (("grpc.ssl_target_name_override", "baton-cluster"),)
    silent = grpc.aio.secure_channel(server.address, credentials, options=named)
    assert await status(silent) is refused, "no certificate"


async def test_a_user_of_the_api_is_no_process_of_the_cluster(server, folder, tls):
    user = tls.model_copy(update={"cert": folder / "client.pem", "key": folder / "client.key"})
    assert await status(open_channel(server.address, user)) is grpc.StatusCode.UNAVAILABLE


async def test_a_server_of_another_cluster_or_name_is_not_believed(server, tls, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    write_certs(other)
    stranger = cluster_tls(other)
    assert await status(open_channel(server.address, stranger)) is grpc.StatusCode.UNAVAILABLE
    misnamed = tls.model_copy(update={"name": "another"})
    assert await status(open_channel(server.address, misnamed)) is grpc.StatusCode.UNAVAILABLE


async def test_a_process_without_tls_is_not_talked_to(tls):
    plain = await WorkerServer.start("127.0.0.1", 0, lambda _: None)
    assert await status(open_channel(plain.address, tls)) is grpc.StatusCode.UNAVAILABLE
    await plain.close(0)


async def test_new_certificates_hold_for_new_connections(server, tls, folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    write_certs(other)
    old = folder / "old"
    old.mkdir()
    for name in ("cluster.pem", "cluster.key", "cluster-ca.pem"):
        shutil.copy(folder / name, old / name)
        shutil.copy(other / name, folder / name)
    assert await status(open_channel(server.address, tls)) is grpc.StatusCode.OK
    before = open_channel(server.address, cluster_tls(old))
    assert await status(before) is grpc.StatusCode.UNAVAILABLE


async def test_a_bad_certificate_is_refused_at_start(folder, tls):
    (folder / "cluster.key").write_text("no key")
    with pytest.raises(InvalidConfig, match="tls"):
        await WorkerServer.start("127.0.0.1", 0, lambda _: None, tls)
