"""Certificates and keys for tests, as docs/deploy.md makes them with openssl and ssh-keygen."""

import datetime
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fedsieve.sites.certificates import CA, CERTIFICATE, PRIVATE

_PEM = serialization.Encoding.PEM


NOW = datetime.datetime.now(datetime.UTC)
USUAL = (NOW - datetime.timedelta(hours=1), NOW + datetime.timedelta(days=365))
Span = tuple[datetime.datetime, datetime.datetime]


def make(
    folder: Path,
    authority_holds: Span = USUAL,
    server_holds: Span = USUAL,
    host: str = "127.0.0.1",
) -> Path:
    """A folder with an authority's certificate, and a server's that it signed for this machine."""
    folder.mkdir()
    ours, theirs = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
    authority, server = _name("authority"), _name("127.0.0.1")
    root = (
        _certificate(authority, authority, ours.public_key(), authority_holds)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(ours.public_key()), critical=False)
        .add_extension(_usage(signs=True), critical=True)
        .sign(ours, hashes.SHA384())
    )
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address(host))]
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(ours.public_key())
    leaf = (
        _certificate(server, authority, theirs.public_key(), server_holds)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(issuer, critical=False)
        .add_extension(_usage(signs=False), critical=True)
        .sign(ours, hashes.SHA384())
    )
    (folder / CA).write_bytes(root.public_bytes(_PEM))
    (folder / CERTIFICATE).write_bytes(leaf.public_bytes(_PEM))
    form = serialization.PrivateFormat.TraditionalOpenSSL
    key = theirs.private_bytes(_PEM, form, serialization.NoEncryption())
    (folder / PRIVATE).write_bytes(key)
    (folder / PRIVATE).chmod(0o600)
    return folder


def node_key(path: Path) -> Path:
    """A node's private key at `path`, and its public one beside it (`.pub`), as ssh-keygen's."""
    key = ec.generate_private_key(ec.SECP384R1())
    form = serialization.PrivateFormat.OpenSSH
    path.write_bytes(key.private_bytes(_PEM, form, serialization.NoEncryption()))
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    path.with_suffix(".pub").write_bytes(public)
    return path


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, holds: Span
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(holds[0])
        .not_valid_after(holds[1])
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
