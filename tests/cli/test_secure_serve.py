"""`baton serve` with keys and certificates for everything; who looks on learns no secret."""

import json
import os
import re
import signal
import ssl
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton.api.key_file import new_key
from baton.cli.certs import write_certs
from baton.cli.tls import cluster_tls
from baton.proto.grpc_runtime import CHANNEL_OPTIONS

PATIENCE_S = 60


def arguments_of_all_processes() -> str:
    """Return what `ps` shows of every process to every user of the machine."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdecimal():
            try:
                found.append((process / "cmdline").read_bytes().decode(errors="replace"))
            except OSError:
                continue  # it has just ended
    return "\n".join(found)


def healthy(address: str, credentials: grpc.ChannelCredentials | None) -> bool:
    named = (*CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", "baton-cluster"))
    opened = (
        grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        if credentials is None
        else grpc.secure_channel(address, credentials, options=named)
    )
    with opened as channel:
        try:
            request = health_pb2.HealthCheckRequest()
            health_pb2_grpc.HealthStub(channel).Check(request, timeout=PATIENCE_S)
        except grpc.RpcError:
            return False
        return True


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_keys_and_certificates_everywhere(baton: Callable[..., Any], tmp_path: Path) -> None:
    certs = tmp_path / "certs"
    write_certs(certs)
    key, entry = new_key("acme", admin=True)
    keys = tmp_path / "keys.json"
    keys.write_text(json.dumps({"tenants": {"acme": {}}, "keys": [entry.model_dump()]}))
    server = baton(
        *("serve", "--port", "0", "--grpc-port", "0", "--kv-memory-mib", "16"),
        *("--api-keys", str(keys), "--cluster-certs", str(certs)),
        *("--tls-cert", str(certs / "server.pem"), "--tls-key", str(certs / "server.key")),
        *("--tls-client-ca", str(certs / "ca.pem"), "--local-prefill", "fallback"),
    )
    worker = re.findall(r"127\.0\.0\.1:\d+", server.wait_for("decode-0    pid"))[0]
    http_url = server.wait_for("OpenAI HTTP API").split()[-1].removesuffix("/v1")
    address = server.wait_for("gRPC API").split()[-1]
    logs = Path(server.wait_for("  logs  ").split()[-1]).parent
    assert "Authorization: Bearer $BATON_API_KEY" in server.wait_for("-H @<")
    server.wait_for("Ctrl-C stops everything")

    context = ssl.create_default_context(cafile=certs / "ca.pem")
    context.load_cert_chain(certs / "client.pem", certs / "client.key")
    with httpx.Client(base_url=http_url, verify=context, timeout=PATIENCE_S) as http:
        request = {"model": "baton-demo", "prompt": "x " * 100, "max_tokens": 4, "ignore_eos": True}
        assert http.post("/v1/completions", json=request).status_code == 401
        http.headers["authorization"] = f"Bearer {key}"
        answer = http.post("/v1/completions", json=request)
        assert answer.json()["usage"]["completion_tokens"] == 4, answer.text
        trace_url = f"/v1/requests/{answer.json()['id']}"
        while (trace := http.get(trace_url)).status_code == 404:
            pass  # it is written down once decode has said its last
        assert trace.json()["tenant"] == "acme"
        assert trace.json()["handovers"][0]["outcome"] == "ok", "instances talk to each other too"
    options = ("--ca", "ca.pem", "--cert", "client.pem", "--key", "client.key", "--max-tokens", "4")
    done = subprocess.run(
        [sys.executable, "-m", "baton.cli.main", "generate", "x", "--address", address, *options],
        cwd=certs,
        env={**os.environ, "BATON_API_KEY": key},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr

    tls = cluster_tls(certs)
    assert tls is not None
    ours = [path.read_bytes() for path in (tls.ca, tls.key, tls.cert)]
    assert healthy(worker, grpc.ssl_channel_credentials(*ours))
    assert not healthy(worker, None)
    assert not healthy(worker, grpc.ssl_channel_credentials(ours[0]))

    said = [path.read_text(errors="replace") for path in logs.rglob("*.log")]
    assert len(said) >= 2, "the instances have logs"
    private = (certs / "cluster.key").read_text().splitlines()[1]
    secrets = (key, key.split("_", 2)[2], private)
    said += [arguments_of_all_processes(), *server.lines]
    assert not [secret for secret in secrets if any(secret in text for text in said)]
    assert server.end(signal.SIGTERM) == 0, "\n".join(server.lines)
    assert not [secret for secret in secrets if any(secret in line for line in server.lines)]
    server.assert_nothing_left()
