"""A test authority and its certificates: what TLS needs where nobody else issues any."""

import datetime
import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from baton.core.config import ClusterTlsConfig
from baton.core.errors import InvalidConfig

HOSTS = ("localhost", "127.0.0.1", "::1")
DAYS = 365
_SERVER, _CLIENT = ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH
_CLOCKS_DIFFER = datetime.timedelta(hours=1)


@dataclass(frozen=True, slots=True)
class Issued:
    """A certificate and its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def cert_pem(self) -> bytes:
        """The certificate, for everybody."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        """The private key."""
        return self.key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )


def make_authority(name: str, days: int = DAYS) -> Issued:
    """Return an authority that signs leaves only."""
    key = ec.generate_private_key(ec.SECP256R1())
    builder = _builder(name, name, key, days).add_extension(
        x509.BasicConstraints(ca=True, path_length=0), critical=True
    )
    return Issued(_with_usage(builder, signs=True).sign(key, hashes.SHA256()), key)


def issue(
    authority: Issued,
    name: str,
    hosts: Sequence[str],
    *,
    server: bool = False,
    client: bool = False,
    days: int = DAYS,
) -> Issued:
    """Return a certificate for a server, a client, or a process that is both."""
    key = ec.generate_private_key(ec.SECP256R1())
    issuer = authority.certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value
    usages = [_SERVER] * server + [_CLIENT] * client
    builder = (
        _builder(name, str(issuer), key, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()),
            critical=False,
        )
    )
    if hosts:
        names = x509.SubjectAlternativeName([_general_name(host) for host in hosts])
        builder = builder.add_extension(names, critical=False)
    builder = _with_usage(builder, signs=False)
    return Issued(builder.sign(authority.key, hashes.SHA256()), key)


def write_certs(folder: Path, hosts: Sequence[str] = HOSTS, days: int = DAYS) -> list[Path]:
    """Write two authorities and what they sign; return the files. InvalidConfig if one is there.

    One is for users (server, client), the other for Baton's processes among themselves: who may
    call the API is not thereby one of them.
    """
    users = make_authority("Baton test authority", days)
    cluster = make_authority("Baton test authority for the cluster", days)
    name = ClusterTlsConfig.model_fields["name"].default
    made = {
        "ca": users,
        "server": issue(users, "baton", hosts, server=True, days=days),
        "client": issue(users, "baton client", (), client=True, days=days),
        "cluster-ca": cluster,
        "cluster": issue(cluster, name, (name,), server=True, client=True, days=days),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for stem in made:
        for path in (folder / f"{stem}.pem", folder / f"{stem}.key"):
            if path.exists():
                raise InvalidConfig("folder", str(path), "one without such a file")
    for stem, issued in made.items():
        (folder / f"{stem}.pem").write_bytes(issued.cert_pem)
        _write_secret(folder / f"{stem}.key", issued.key_pem)
    return [folder / f"{stem}{end}" for stem in made for end in (".pem", ".key")]


def _builder(
    name: str, issuer: str, key: ec.EllipticCurvePrivateKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    public = key.public_key()
    return (
        x509.CertificateBuilder()
        .subject_name(_name(name))
        .issuer_name(_name(issuer))
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCKS_DIFFER)
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _with_usage(builder: x509.CertificateBuilder, *, signs: bool) -> x509.CertificateBuilder:
    usage = x509.KeyUsage(
        digital_signature=not signs,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
    return builder.add_extension(usage, critical=True)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        return x509.DNSName(host)
    except ValueError:
        raise InvalidConfig("--host", host, "an address or a DNS name in ASCII") from None


def _write_secret(path: Path, content: bytes) -> None:
    """Write a file that only its owner may read, from its first moment on."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
