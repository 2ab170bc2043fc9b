"""Certificates made for a test, as Ray's TLS takes them: an authority, and files signed by it."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

DAY = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Certificate:
    """One end's files: its certificate and key, and the authority it trusts."""

    certificate: Path
    key: Path
    authority: Path

    def turn_on(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Set what switches Ray's TLS on."""
        monkeypatch.setenv("RAY_USE_TLS", "1")
        monkeypatch.setenv("RAY_TLS_SERVER_CERT", str(self.certificate))
        monkeypatch.setenv("RAY_TLS_SERVER_KEY", str(self.key))
        monkeypatch.setenv("RAY_TLS_CA_CERT", str(self.authority))


class Authority:
    """Signs certificates into a folder."""

    def __init__(self, folder: Path, name: str = "authority") -> None:
        self._folder, self._name = folder, name
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._count = 0
        self.file, self.key_file = folder / f"{name}.crt", folder / f"{name}.key"
        self.file.write_bytes(_pem(self._sign(name, self._key.public_key(), DAY, authority=True)))
        self.key_file.write_bytes(_key(self._key))

    def certificate(self, valid: datetime.timedelta = DAY) -> Certificate:
        """A new one, for any host; `valid` below zero: no longer."""
        self._count += 1
        name = f"{self._name}-{self._count}"
        key = ec.generate_private_key(ec.SECP256R1())
        files = Certificate(self._folder / f"{name}.crt", self._folder / f"{name}.key", self.file)
        files.certificate.write_bytes(_pem(self._sign(name, key.public_key(), valid)))
        files.key.write_bytes(_key(key))
        return files

    def _sign(
        self, name: str, key: ec.EllipticCurvePublicKey, valid: datetime.timedelta, *, authority: bool = False
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, self._name)]))
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - 2 * DAY)
            .not_valid_after(now + valid)
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .sign(self._key, hashes.SHA256())
        )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key(key: ec.EllipticCurvePrivateKey) -> bytes:
    form = serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
