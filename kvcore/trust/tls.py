"""TLS of a listener: its certificate, read again when its files change; and clients that take that one alone."""

import asyncio
import logging
import re
import ssl
from pathlib import Path

from kvcore.config.security import TlsConfig
from kvcore.errors import ConfigError
from kvcore.telemetry import log_fields
from kvcore.trust.files import FileStamp, stamp_of

_logger = logging.getLogger("kvcore.trust")
_CERTIFICATE = re.compile("-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.S)


class ServerCertificate:
    """A listener's. `context` is the same for ever: what is loaded into it later holds for connections after that."""

    def __init__(self, config: TlsConfig, where: str = "router.tls") -> None:
        """Blocking. Raises ConfigError, which begins with `where`: the files cannot be used."""
        self._config, self._where = config, where
        self._seen, self._complained = self._stamps(), ""
        self.context = self._loaded(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))

    def __repr__(self) -> str:
        return f"<ServerCertificate {self._config.cert}>"

    def refresh(self) -> bool:
        """Whether there is another certificate than before. Files that cannot be used, or do not belong together (yet),
        change nothing, are logged, and are looked at again when they change. Microseconds, unless they did."""
        try:
            stamps = self._stamps()
            self._complained = ""
            if stamps == self._seen:
                return False
            self._seen = stamps
            self._loaded(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))  # what is half-written must not get into use
            self._loaded(self.context)
        except ConfigError as error:
            if error.message != self._complained:  # a file that is away is so for many looks
                log_fields(_logger, logging.ERROR, "certificate_not_reloaded", reason=error.message)
            self._complained = error.message
            return False
        log_fields(_logger, logging.INFO, "certificate_reloaded", cert=self._config.cert)
        return True

    async def follow(self, look_s: float = 1.0) -> None:
        """Look for another one once in `look_s`, until cancelled."""
        while True:
            await asyncio.sleep(look_s)
            self.refresh()

    def _stamps(self) -> list[FileStamp]:
        return [stamp_of(path, self._where) for path in (self._config.cert, self._config.key)]

    def _loaded(self, context: ssl.SSLContext) -> ssl.SSLContext:
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
