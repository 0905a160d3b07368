"""`kvferry secret certs FOLDER --config FILE`: a CA of a cluster's own, and a certificate of each of its processes.

For trying and for small clusters: the CA's key is in a file, and whoever has it makes certificates.
"""

import datetime
import ipaddress
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from kvcore.config.file import load_config
from kvcore.config.schema import ClusterConfig
from kvcore.config.servers import metadata_servers, routers_of
from kvcore.errors import ConfigError
from kvcore.trust.opening import CLIENT

_LOOPBACKS = ("127.0.0.1", "::1", "localhost")
_EVERY_INTERFACE = ("0.0.0.0", "::")


@dataclass(frozen=True, slots=True)
class Authority:
    """Who issues certificates."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def new(cls, name: str, days: float = 3650.0) -> "Authority":
        """With a key of its own."""
        key = ec.generate_private_key(ec.SECP256R1())
        uses = x509.KeyUsage(True, False, False, False, False, True, True, False, False)
        builder = _begun(_name(name), _name(name), key.public_key(), days, 1 / 24)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        return cls(builder.add_extension(uses, critical=True).sign(key, hashes.SHA256()), key)

    @classmethod
    def read(cls, folder: Path) -> "Authority":
        """As `write` left it. Raises ConfigError."""
        try:
            certificate = x509.load_pem_x509_certificate((folder / "ca.pem").read_bytes())
            key = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{folder}: ca.pem and ca.key are no CA of ours: {error}") from error
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        return cls(certificate, key)

    def write(self, folder: Path) -> None:
        """`ca.pem` and `ca.key`."""
        _write(folder / "ca.pem", _pem(self.certificate), 0o644)
        _write(folder / "ca.key", _key_pem(self.key), 0o600)

    def issue(
        self,
        folder: Path,
        name: str,
        hosts: Iterable[str] = _LOOPBACKS,
        days: float = 365.0,
        *,
        age_days: float = 1 / 24,
    ) -> None:
        """`NAME.pem` and `NAME.key`, of a process that is called so and reached at `hosts`; from `age_days` ago, for
        clocks that are behind ours, until `days` from now."""
        key = ec.generate_private_key(ec.SECP256R1())
        names = [x509.DNSName(name), *(_host(host) for host in hosts if host != name)]
        both = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
        builder = _begun(self.certificate.subject, _name(name), key.public_key(), days, age_days)
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        own = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        made = builder.add_extension(own, critical=False).add_extension(both, critical=False)
        _write(folder / f"{name}.key", _key_pem(key), 0o600)
        _write(folder / f"{name}.pem", _pem(made.sign(self.key, hashes.SHA256())), 0o644)


def run_certs(folder: Path, config_file: Path, days: float) -> int:
    """Write new certificates, from the CA that is in the folder or a new one; returns 0. Raises ConfigError."""
    config = load_config(config_file)
    _check_names(config)
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        if not (folder / "ca.pem").exists():
            Authority.new(f"CA of {config.cluster}").write(folder)
        authority = Authority.read(folder)
        for name, hosts in processes_of(config).items():
            authority.issue(folder, name, hosts, days)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror}") from error
    print(f"{folder}: certificates of {', '.join(processes_of(config))} for {days:g} days")
    cert, key, ca = (str(folder / name) for name in ("{name}.pem", "{name}.key", "ca.pem"))
    print(f'security.tls: {{cert: "{cert}", key: "{key}", ca: "{ca}"}}')
    return 0


def processes_of(config: ClusterConfig) -> dict[str, list[str]]:
    """The processes of a cluster file that have certificates, and where each is reached."""
    servers = [host for host, _ in metadata_servers(config.metadata_server)]
    hosts = {"metadata-server": servers, "router": [host for host, _ in routers_of(config)], CLIENT: []}
    hosts |= {name: [node.host] for name, node in config.nodes.items()}
    return {name: [*_LOOPBACKS, *_reached(found)] for name, found in hosts.items()}


def _check_names(config: ClusterConfig) -> None:
    """Raises ConfigError where a process is reached by another's name, in which its certificate could speak, too."""
    processes = processes_of(config)
    for name, hosts in processes.items():
        if both := sorted((set(hosts) & processes.keys()) - {name}):
            raise ConfigError(
                f"{name} is at the host {both[0]}, which is another process's name: with a certificate for it {name} "
                f"could speak as {both[0]}; give the node another name, or the host by its address"
            )


def _reached(hosts: Iterable[str]) -> list[str]:
    return sorted({host for host in hosts if host not in (*_LOOPBACKS, *_EVERY_INTERFACE)})


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])


def _begun(
    issuer: x509.Name, subject: x509.Name, key: ec.EllipticCurvePublicKey, days: float, age_days: float
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    begin, end = now - datetime.timedelta(days=age_days), now + datetime.timedelta(days=days)
    return x509.CertificateBuilder(issuer, subject, key, x509.random_serial_number(), begin, end)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    plain = serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)


def _write(path: Path, data: bytes, mode: int) -> None:
    """Whole, in one step: who reads it meanwhile reads the old one."""
    written = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(written, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
    written.replace(path)
