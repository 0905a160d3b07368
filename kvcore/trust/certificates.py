"""The certificates by which a cluster's processes know each other over HTTP (mutual TLS 1.3).

Owns a process's own certificate and the CA of the others, read again when their files change. Invariants: what comes
into use has met itself in a handshake first, so that no half-written, expired or foreign pair of files does; a
connection that stands keeps what it began with; no session is resumed, so that each connection shows a certificate.
"""

import asyncio
import logging
import math
import os
import ssl
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from kvcore.clock import Clock, SystemClock
from kvcore.config.security import ClusterTlsConfig
from kvcore.errors import ConfigError
from kvcore.peer_log import PeerLog
from kvcore.telemetry import log_fields
from kvcore.trust.files import FileStamp, check_private, stamp_of
from kvcore.trust.tls import RenewedContext

_logger = logging.getLogger("kvcore.trust")
_WHERE = "security.tls"
_SHAKES = 4
"""Turns of both ends that a handshake takes at most."""

PeerNames = frozenset[str]


class ProcessCertificate:
    """One process's. `server` and `client` are the same for ever; a connection gets what is read when it is made."""

    def __init__(
        self, config: ClusterTlsConfig, clock: Clock | None = None, look_s: float = 1.0, again_s: float = 10.0
    ) -> None:
        """Blocking: reads the files. Raises ConfigError: they cannot be used. `look_s`: between two looks at them;
        `again_s`: until those that could not be used are tried again, though they are the same."""
        self._config, self._clock, self._look_s, self._again_s = config, clock or SystemClock(), look_s, again_s
        self._again_at = math.inf
        self._looked = self._clock.now()
        self._seen = self._stamps()
        self._loaded, self._complained = self._load(), ""
        self.server: ssl.SSLContext = RenewedContext(ssl.PROTOCOL_TLS_SERVER).of(lambda: self.current()[0])
        """Of a listener: asks for a certificate, and takes none but the cluster's; whether there has to be one is the
        application's to say (`peer_names`)."""
        self.client: ssl.SSLContext = RenewedContext(ssl.PROTOCOL_TLS_CLIENT).of(lambda: self.current()[1])
        """Of whoever asks such a listener, by the name or address that its certificate has."""

    def __repr__(self) -> str:
        return f"<ProcessCertificate {self._config.cert}>"

    def current(self) -> tuple[ssl.SSLContext, ssl.SSLContext]:
        """What a new connection gets as a server and as a client. Looks at the files once in `look_s`."""
        if (now := self._clock.now()) - self._looked >= self._look_s:
            self._looked = now
            self.refresh()
        return self._loaded

    def refresh(self) -> bool:
        """Whether there are others than before. Files that cannot be used, or do not belong together (yet), change
        nothing, are logged, and are tried again when they change, or later: a certificate may be of a clock that is
        ahead of ours. Microseconds, unless they did."""
        now = self._clock.now()
        try:
            stamps = self._stamps()
            if stamps != self._seen or self._again_at == math.inf:
                self._complained = ""
            if stamps == self._seen and now < self._again_at:
                return False
            self._seen, self._again_at = stamps, now + self._again_s
            self._loaded = self._load()
            self._again_at = math.inf
        except ConfigError as error:
            if error.message != self._complained:  # a file that is away is so for many looks
                log_fields(_logger, logging.ERROR, "certificate_not_reloaded", reason=error.message)
            self._complained = error.message
            return False
        log_fields(_logger, logging.INFO, "certificate_reloaded", cert=self._config.cert)
        return True

    def why_not_at(self, host: str) -> str | None:
        """Why a client that asks `host` would not take this certificate there; None: it would."""
        server, client = self._loaded
        reached = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        try:
            _meet(server, client, reached or None)
        except ssl.SSLCertVerificationError as error:
            return error.verify_message
        return None

    async def follow(self) -> None:
        """Look for others though nobody connects, until cancelled."""
        while True:
            await asyncio.sleep(self._look_s)
            self.refresh()

    def _stamps(self) -> list[FileStamp]:
        return [stamp_of(path, _WHERE) for path in (self._config.cert, self._config.key, self._config.ca)]

    def _load(self) -> tuple[ssl.SSLContext, ssl.SSLContext]:
        server, client = self._made(ssl.PROTOCOL_TLS_SERVER), self._made(ssl.PROTOCOL_TLS_CLIENT)
        server.verify_mode = ssl.CERT_OPTIONAL
        server.num_tickets = 0
        try:
            _meet(server, client, None)
        except ssl.SSLCertVerificationError as error:
            cert, ca = self._config.cert, self._config.ca
            raise ConfigError(f"{_WHERE}.cert: {cert}: {error.verify_message}, by the CA of {ca}") from None
        except ssl.SSLError as error:
            raise ConfigError(f"{_WHERE}: {self._config.cert} cannot be used: {error.reason}") from None
        return server, client

    def _made(self, protocol: int) -> ssl.SSLContext:
        cert, key, ca = self._config.cert, self._config.key, self._config.ca
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.sslobject_class = _SayingObject
        try:
            with Path(key).open("rb") as file:
                check_private(os.fstat(file.fileno()), f"{_WHERE}.key: {key}")
            context.load_cert_chain(cert, key, password=lambda: "")
        except (OSError, ValueError) as error:  # ssl's errors are OSErrors
            raise ConfigError(f"{_WHERE}: {cert} and {key} are no certificate with its key: {error}") from error
        try:
            context.load_verify_locations(ca)
        except OSError as error:
            raise ConfigError(f"{_WHERE}.ca: {ca} has no certificate: {error}") from error
        return context


def open_certificate(config: ClusterTlsConfig | None, name: str) -> ProcessCertificate | None:
    """The certificate of the process `name`; None: the cluster has none. Blocking. Raises ConfigError."""
    return None if config is None else ProcessCertificate(named(config, name))


def named(config: ClusterTlsConfig, name: str) -> ClusterTlsConfig:
    """The files of the process `name`."""
    cert, key, ca = (file.replace("{name}", name) for file in (config.cert, config.key, config.ca))
    return ClusterTlsConfig(cert=cert, key=key, ca=ca)


def ca_context(config: ClusterTlsConfig) -> ssl.SSLContext:
    """Of who only asks whether a process is well: knows it by the CA, and shows no certificate. Raises ConfigError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(config.ca)
    except OSError as error:
        raise ConfigError(f"{_WHERE}.ca: {config.ca} has no certificate: {error}") from error
    return context


def peer_names(transport: Any) -> PeerNames | None:
    """The DNS names in the certificate that the other end of a connection has shown, and that was verified; None: it
    has shown none, or the connection is not encrypted. `transport`: an asyncio transport, or None."""
    shown: Mapping[str, Any] | None = transport.get_extra_info("peercert") if transport is not None else None
    if not shown:
        return None
    return frozenset(name for kind, name in shown.get("subjectAltName", ()) if kind == "DNS")


class _SayingObject(ssl.SSLObject):
    """One connection, that says why it took nobody; asyncio keeps that to itself."""

    def do_handshake(self) -> None:
        """As of its class."""
        try:
            super().do_handshake()
        except ssl.SSLCertVerificationError as error:
            self._say(error.verify_message)
            raise
        except ssl.SSLError as error:
            if error.reason == "HTTP_REQUEST":
                self._say("it speaks HTTP without TLS: give it the same security.tls")
            raise

    def _say(self, reason: str) -> None:
        if self.server_side:
            _said.say(logging.WARNING, "certificate_refused", reason, None, reason=reason)


_said = PeerLog(_logger)


def _meet(server: ssl.SSLContext, client: ssl.SSLContext, host: str | None) -> None:
    """A handshake in memory, of a client that asks `host` or, None, whomever. Raises ssl.SSLError as the end does that
    refuses the other."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client.check_hostname = host is not None
    asking = client.wrap_bio(to_client, to_server, server_hostname=host)
    client.check_hostname = True
    ends = asking, server.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(_SHAKES):
        for end in ends:
            with suppress(ssl.SSLWantReadError):
                end.do_handshake()
