"""What a secret looks like as text: one a line, the first signs. Pure, but for making a new one."""

import base64
import binascii
import re
import secrets

MIN_SECRET_BYTES = 32
MAX_SECRETS = 2

_MIN_DISTINCT = 16
"""Of 32 random bytes fewer than 16 differ from each other once in 10^15: what has fewer was not drawn at random."""
_MAX_TEXT = 4096


class BadSecretError(ValueError):
    """A text that is no secret. It says which line and why, and shows nothing of it."""


def parse_secrets(text: str) -> tuple[bytes, ...]:
    """One or two secrets, the one that signs first. Empty lines and those that begin with `#` are skipped. Raises
    BadSecretError."""
    if len(text) > _MAX_TEXT:
        raise BadSecretError(f"it is longer than {_MAX_TEXT} characters")
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1)]
    found = [_decode(number, line) for number, line in lines if line and not line.startswith("#")]
    if not found:
        raise BadSecretError("it is empty")
    if len(found) > MAX_SECRETS:
        raise BadSecretError(f"it has {len(found)} secrets; {MAX_SECRETS} at most, the new one and the one before it")
    if len(set(found)) < len(found):
        raise BadSecretError("it has the same secret twice")
    return tuple(found)


def new_secret() -> str:
    """A secret of 32 random bytes, as a line without its end."""
    return base64.urlsafe_b64encode(secrets.token_bytes(MIN_SECRET_BYTES)).decode().rstrip("=")


def _decode(number: int, line: str) -> bytes:
    try:
        if re.fullmatch(r"(?:[0-9a-fA-F]{2})+", line):
            value = bytes.fromhex(line)
        else:
            plain = line.replace("-", "+").replace("_", "/").rstrip("=")
            value = base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except (ValueError, binascii.Error):
        raise BadSecretError(f"line {number} is neither hex nor base64") from None
    if len(value) < MIN_SECRET_BYTES:
        raise BadSecretError(f"line {number} has {len(value)} bytes; a secret has {MIN_SECRET_BYTES} or more")
    if len(set(value)) < _MIN_DISTINCT:
        raise BadSecretError(f"line {number} was not drawn at random")
    return value
