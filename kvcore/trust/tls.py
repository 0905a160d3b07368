"""TLS of a listener: its certificate, read again when its files change; and clients that take that one alone."""

import asyncio
import logging
import re
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvcore.config.security import TlsConfig
from kvcore.errors import ConfigError
from kvcore.telemetry import log_fields
from kvcore.trust.files import FileStamp, stamp_of

_logger = logging.getLogger("kvcore.trust")
_CERTIFICATE = re.compile("-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.S)


class RenewedContext(ssl.SSLContext):
    """A context for servers and clients that are given one once: each connection is of the one that is current when it
    begins. `_current`: which that is, set by `of`."""

    _current: Callable[[], ssl.SSLContext]

    def of(self, current: Callable[[], ssl.SSLContext]) -> "RenewedContext":
        """Itself, which asks `current` for each connection."""
        self._current = current
        return self

    def wrap_bio(self, *arguments: Any, **options: Any) -> ssl.SSLObject:
        """As asyncio and uvloop begin each connection."""
        return self._current().wrap_bio(*arguments, **options)


class ServerCertificate:
    """A listener's. `context` is the same for ever: a connection gets what is in use when it begins, a certificate
    and its key that were loaded together and fit."""

    def __init__(self, config: TlsConfig, where: str = "router.tls") -> None:
        """Blocking. Raises ConfigError, which begins with `where`: the files cannot be used."""
        self._config, self._where = config, where
        self._seen, self._complained = self._stamps(), ""
        self._in_use = self._loaded()
        self.context: ssl.SSLContext = RenewedContext(ssl.PROTOCOL_TLS_SERVER).of(lambda: self._in_use)

    def __repr__(self) -> str:
        return f"<ServerCertificate {self._config.cert}>"

    def refresh(self) -> bool:
        """Whether there is another certificate than before. Files that cannot be used, do not belong together (yet), or
        change while they are read, change nothing, and are looked at again when they change; but for the last they are
        logged. Microseconds, unless they did."""
        try:
            stamps = self._stamps()
            self._complained = ""
            if stamps == self._seen:
                return False
            self._seen = stamps
            loaded = self._loaded()
            if self._stamps() != stamps:
                return False  # of a chain that is being written the first certificate alone fits the key, too
        except ConfigError as error:
            if error.message != self._complained:  # a file that is away is so for many looks
                log_fields(_logger, logging.ERROR, "certificate_not_reloaded", reason=error.message)
            self._complained = error.message
            return False
        self._in_use = loaded
        log_fields(_logger, logging.INFO, "certificate_reloaded", cert=self._config.cert)
        return True

    async def follow(self, look_s: float = 1.0) -> None:
        """Look for another one once in `look_s`, until cancelled."""
        while True:
            await asyncio.sleep(look_s)
            self.refresh()

    def _stamps(self) -> list[FileStamp]:
        return [stamp_of(path, self._where) for path in (self._config.cert, self._config.key)]

    def _loaded(self) -> ssl.SSLContext:
        # Never into the context in use: OpenSSL puts the certificate in before it looks at the key, and keeps one of
        # each kind of key, so that of an RSA pair that an EC pair takes the place of clients would get either.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        cert, key = self._config.cert, self._config.key
        try:
            context.load_cert_chain(cert, key, password=lambda: "")
        except (OSError, ValueError) as error:  # ssl's errors are OSErrors
            raise ConfigError(f"{self._where}: {cert} and {key} are no certificate with its key: {error}") from error
        return context


def pinned_context(cert: str) -> ssl.SSLContext:
    """For clients on a machine that has the file: takes the server that has this certificate, by whatever name it is
    called, and no other: not one from the same issuer, whose certificate may follow in the file. Blocking. Raises
    ConfigError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    try:
        first = _CERTIFICATE.search(Path(cert).read_text("ascii", errors="replace"))
        if first is None:
            raise ValueError("there is no certificate in it")
        context.load_verify_locations(cadata=first[0])
    except (OSError, ValueError) as error:
        raise ConfigError(f"router.tls.cert: {cert} cannot be used: {error}") from error
    return context
