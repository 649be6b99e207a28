from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError
from typer.testing import CliRunner, Result

from baton.api.key_file import hash_of, id_of, parse
from baton.cli.main import app


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def read(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def test_certificates_that_a_strict_verifier_takes(tmp_path: Path):
    result = run("certs", str(tmp_path / "new"), "--host", "gateway.example", "--days", "7")
    assert result.exit_code == 0, result.output
    assert f"--tls-cert {tmp_path}/new/server.pem" in result.output.replace("\n", "")
    folder = tmp_path / "new"
    users, cluster = read(folder / "ca.pem"), read(folder / "cluster-ca.pem")
    server = read(folder / "server.pem")
    lasts = server.not_valid_after_utc - server.not_valid_before_utc
    assert lasts.days == 7
    verifier = PolicyBuilder().store(Store([users]))
    for host in ("gateway.example", "localhost"):
        verifier.build_server_verifier(x509.DNSName(host)).verify(server, [])
    with pytest.raises(VerificationError):
        verifier.build_server_verifier(x509.DNSName("other")).verify(server, [])
    process = read(folder / "cluster.pem")
    inside = PolicyBuilder().store(Store([cluster]))
    inside.build_server_verifier(x509.DNSName("baton-cluster")).verify(process, [])
    inside.build_client_verifier().verify(process, [])
    with pytest.raises(VerificationError):
        verifier.build_client_verifier().verify(process, [])


def test_nothing_is_overwritten(tmp_path: Path):
    assert run("certs", str(tmp_path)).exit_code == 0
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    again = run("certs", str(tmp_path))
    assert again.exit_code == 2
    assert "ca.pem" in again.output
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


def test_a_host_that_is_none(tmp_path: Path):
    refused = run("certs", str(tmp_path), "--host", "müller")
    assert refused.exit_code == 2
    assert "--host" in refused.output
    assert not list(tmp_path.iterdir())


def test_a_new_key_and_the_line_to_store(tmp_path: Path):
    result = run("keys", "new", "acme", "--admin")
    assert result.exit_code == 0
    key = result.output.split()[0]
    lines = result.output.splitlines()
    entry = next(line for line in lines if "hash:" in line)
    tenant = next(line for line in lines if line.startswith("  acme"))
    file = parse(Path("keys.yaml"), f"tenants:\n{tenant}\nkeys:\n{entry}\n".encode())
    assert file.keys[0].hash == hash_of(key)
    assert file.keys[0].id == id_of(key)
    assert file.keys[0].admin
    assert result.output.count(key) == 1


def test_a_tenant_that_cannot_be():
    refused = run("keys", "new", "No Such")
    assert refused.exit_code == 2
    assert "tenant: 'No Such' is not allowed" in refused.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--tls-cert", "none.pem"), "--tls-key"),
        (("--tls-key", "none.key"), "--tls-cert"),
        (("--tls-cert", "none.pem", "--tls-key", "none.key"), "tls.cert: 'none.pem'"),
        (("--cluster-certs", "none"), "cluster.pem"),
        (("--api-keys", "none.yaml"), "api_keys: 'none.yaml'"),
    ],
)
def test_files_that_are_not_there_are_refused_before_anything_starts(arguments, words):
    result = run("serve", "--port", "0", "--grpc-port", "0", *arguments)
    assert result.exit_code == 2, result.output
    assert words in result.output
    assert "starting Ray" not in result.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--cert", "x", "--key", "y"), "--ca"),
        (("--ca", "x", "--key", "y"), "--cert"),
        (("--ca", "none.pem"), "--ca: 'none.pem'"),
    ],
)
def test_a_client_with_half_of_what_it_needs(arguments, words):
    result = run("generate", "x", *arguments)
    assert result.exit_code == 2
    assert words in result.output
