"""Checks of what the cluster trusts: its secret, its certificates, its API keys, of their files as they are here; and
the clocks by which it judges proofs."""

import datetime
from collections.abc import Iterator
from pathlib import Path

from cryptography import x509

from kvcore.config.checks import open_line
from kvcore.config.security import ClusterTlsConfig
from kvcore.errors import ConfigError
from kvcore.tenants.source import KeySource
from kvcore.trust.certificates import ProcessCertificate, named
from kvcore.trust.files import why_not_private
from kvcore.trust.limits import ProofLimits
from kvcore.trust.opening import CLIENT
from kvcore.trust.secrets import open_secrets
from kvferry.doctor.findings import Context, Finding
from kvferry.machine import is_local

_SUBJECT = "security"
_SOON = datetime.timedelta(days=14)
_SOON_OF_ALL = 5
"""The certificate ends soon once a fifth of its time is left, and less than `_SOON`: some hold for a day alone."""


def check_security(context: Context) -> list[Finding]:
    """Reads the secret, or runs its command, and the files of processes that are on this machine."""
    return [
        *_check_secret(context),
        *_check_certificates(context),
        *_check_router_tls(context),
        *_check_keys(context),
        *_check_clocks(context),
    ]


def _check_secret(context: Context) -> Iterator[Finding]:
    security = context.config.security
    try:
        secrets = open_secrets(security.secret)
    except ConfigError as error:
        yield Finding(_SUBJECT, False, error.message, "see `security.secret` in docs/config.md")
        return
    if (line := open_line(context.config)) is not None:
        yield Finding(_SUBJECT, True, line)
    elif secrets is None and security.tls is not None:
        yield Finding(_SUBJECT, True, "there is no secret: segments and chunks are protected by nothing")
    if secrets is not None:
        keys = secrets.accepted
        before = f", {keys[1].id.hex()} is accepted too" if len(keys) > 1 else ""
        yield Finding(_SUBJECT, True, f"the cluster has a secret: {keys[0].id.hex()} signs{before}")


def _check_certificates(context: Context) -> Iterator[Finding]:
    tls = context.config.security.tls
    if tls is None:
        return
    ends = {}
    for name, host in _processes_here(context).items():
        own = named(tls, name)
        try:
            why = ProcessCertificate(own).why_not_at(host)
        except ConfigError as error:
            yield _bad(name, error.message, "see `security.tls` in docs/config.md")
            continue
        listed = context.config.security.nodes
        read = _read(own)
        if why is not None:
            yield _bad(name, f"{own.cert}: {why}", f"give it a certificate of {host} (subjectAltName)")
        elif listed is not None and name in listed and name not in _dns_names(read):
            yield _bad(name, f"{own.cert} has not the name {name}", f"give it one with {name} among its DNS names")
        elif _ends_soon(read):
            yield _bad(name, f"{own.cert} ends {_day(read)}", "renew it: a process takes it up as soon as it is there")
        else:
            ends[name] = read
    if ends:
        first = min(ends, key=lambda name: ends[name].not_valid_after_utc)
        text = f"certificates are good, those of {', '.join(ends)}; {first}'s ends first, {_day(ends[first])}"
        yield Finding(_SUBJECT, True, text)


def _check_router_tls(context: Context) -> Iterator[Finding]:
    tls, host = context.config.router.tls, context.config.router.host
    if tls is None or not (context.all_here or is_local(host)):
        return
    try:
        why = why_not_private(Path(tls.key).stat())
        found = x509.load_pem_x509_certificate(Path(tls.cert).read_bytes())
    except (OSError, ValueError) as error:
        yield Finding(_SUBJECT, False, f"router.tls: {error}", "correct router.tls.cert and .key")
        return
    if why is not None:
        yield Finding(_SUBJECT, False, f"router.tls.key: {tls.key}: {why}", f"chmod 600 {tls.key}")
    if _ends_soon(found):
        remedy = "renew it: the router takes it up as soon as it is there"
        yield Finding(_SUBJECT, False, f"router.tls.cert: {tls.cert} ends {_day(found)}", remedy)


def _check_keys(context: Context) -> Iterator[Finding]:
    """The file is the routers', and of those with cache shares: elsewhere it need not be."""
    keys, here = context.config.security.keys, context.all_here or is_local(context.config.router.host)
    if keys is None or not (here or (keys.file is not None and Path(keys.file).exists())):
        return
    try:
        ring = KeySource(keys).ring
    except ConfigError as error:
        yield Finding(_SUBJECT, False, error.message, "see docs/tenants.md")
        return
    admin = any(record.admin for record in ring.records)
    none = "" if admin else "; none is an admin's, so that orders need a proof of the secret"
    yield Finding(_SUBJECT, True, f"API keys: {len(ring)} of {len(ring.tenants)} tenants{none}")


def _check_clocks(context: Context) -> Iterator[Finding]:
    """Half of what is allowed is wrong: of two machines one may be ahead as far as the other is behind."""
    clocks, most_s = context.running.clocks, ProofLimits().skew_s
    if context.config.security.secret is None or not clocks:
        return
    far = {host: ahead for host, ahead in clocks.items() if abs(ahead) >= most_s / 2}
    for host, ahead in far.items():
        off = f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} this machine's"
        detail = (
            f"the clock of {host} is {off}; proofs between machines whose clocks are {most_s:g} s apart are refused"
        )
        yield Finding(f"clock of {host}", False, detail, "have NTP set the clocks of both (chronyc tracking)")
    if not far:
        apart = max([0.0, *clocks.values()]) - min([0.0, *clocks.values()])
        shown = f"those of {', '.join(clocks)} and this machine are within {max(1.0, apart):.0f} s"
        yield Finding("clocks", True, f"{shown}; proofs allow {most_s:g} s")


def _processes_here(context: Context) -> dict[str, str]:
    """Name -> the host by which others reach it, or empty: nobody does."""
    config = context.config
    hosts = {"metadata-server": config.metadata_server.host, "router": config.router.host}
    hosts |= {name: node.host for name, node in config.nodes.items()}
    return {CLIENT: ""} | {name: host for name, host in hosts.items() if context.all_here or is_local(host)}


def _read(own: ClusterTlsConfig) -> x509.Certificate:
    return x509.load_pem_x509_certificate(Path(own.cert).read_bytes())


def _dns_names(certificate: x509.Certificate) -> list[str]:
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return []
    return found.value.get_values_for_type(x509.DNSName)


def _ends_soon(certificate: x509.Certificate) -> bool:
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    left = end - datetime.datetime.now(datetime.UTC)
    return left < min(_SOON, (end - begin) / _SOON_OF_ALL)


def _day(certificate: x509.Certificate) -> str:
    return certificate.not_valid_after_utc.strftime("%Y-%m-%d %H:%M UTC")


def _bad(name: str, detail: str, remedy: str) -> Finding:
    return Finding(f"{_SUBJECT} of {name}", False, detail, remedy)
