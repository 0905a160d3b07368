"""Ids of requests and answers that nobody can guess, drawn many at a time: a call of the system takes a microsecond."""

import secrets

_DRAWN = 128
_DIGITS = 32
_ids: list[str] = []


def new_id() -> str:
    """32 hexadecimal digits."""
    if not _ids:
        drawn = secrets.token_hex(_DRAWN * _DIGITS // 2)
        _ids.extend(drawn[start : start + _DIGITS] for start in range(0, len(drawn), _DIGITS))
    return _ids.pop()
