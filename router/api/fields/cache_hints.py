"""The fields by which clients of OpenAI's and Anthropic's APIs ask something of the cache, read as hints.

None is ever refused, whatever it holds, and no answer depends on any. What becomes of them is `router.cache.hints`'s.
"""

import re
from collections.abc import Iterator, Mapping, Sequence

import msgspec

from router.requests.hints import CacheHint

_MAX_HINTS = 8
_NONE_GIVEN = (None,) * 4
_MAX_CHARS = 64
_MAX_SESSION_CHARS = 512
_ANTHROPIC_TTL = "5m"
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_UNKNOWN = "its value is not understood"
_BY_ITSELF = "the cache finds every prompt's beginning by itself"


class CacheHintFields(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of a request. `cache_control` and `prompt_cache_breakpoint` may stand in messages and parts, too."""

    cache_control: object = None
    prompt_cache_key: object = None
    prompt_cache_options: object = None
    prompt_cache_retention: object = None
    session_id: object = None


class MarkedForCache(msgspec.Struct, frozen=True):
    """What a message or a part may hold."""

    cache_control: object = None
    prompt_cache_breakpoint: object = None


def hints_of(request: CacheHintFields, marks: Sequence[MarkedForCache] = ()) -> tuple[CacheHint, ...]:
    """All hints of a request, each once; the first few."""
    given = (
        request.prompt_cache_key,
        request.prompt_cache_retention,
        request.prompt_cache_options,
        request.cache_control,
    )
    if not marks and given == _NONE_GIVEN:
        return ()
    return tuple(dict.fromkeys(_all(request, marks)))[:_MAX_HINTS]


def session_of(request: CacheHintFields) -> str:
    """What the client names its requests by that belong together; empty: it does not."""
    named = request.prompt_cache_key or request.session_id
    return named[:_MAX_SESSION_CHARS] if isinstance(named, str) else ""


def _all(request: CacheHintFields, marks: Sequence[MarkedForCache]) -> Iterator[CacheHint]:
    if (key := request.prompt_cache_key) is not None:
        yield CacheHint("prompt_cache_key", _shown(key), note=_BY_ITSELF)
    if (kept := request.prompt_cache_retention) is not None:
        if kept in ("in_memory", "in-memory"):
            yield CacheHint("prompt_cache_retention", str(kept), note="so it is with every prompt")
        else:
            yield _lasting("prompt_cache_retention", kept, kept)
    if (options := request.prompt_cache_options) is not None:
        ttl = options.get("ttl") if isinstance(options, Mapping) else None
        yield _lasting("prompt_cache_options", options, ttl)
    for mark in (request.cache_control, *(mark.cache_control for mark in marks)):
        if mark is not None:
            ephemeral = isinstance(mark, Mapping) and mark.get("type") == "ephemeral"
            ttl = mark.get("ttl") or _ANTHROPIC_TTL if ephemeral and isinstance(mark, Mapping) else None
            yield _lasting("cache_control", mark, ttl)
    for mark in marks:
        if mark.prompt_cache_breakpoint is not None:
            yield CacheHint("prompt_cache_breakpoint", _shown(mark.prompt_cache_breakpoint), note=_BY_ITSELF)


def _lasting(name: str, value: object, ttl: object) -> CacheHint:
    found = re.fullmatch(r"([0-9]{1,6})([smhd])", ttl) if isinstance(ttl, str) else None
    if found is None or not int(found[1]):
        return CacheHint(name, _shown(value), note=_UNKNOWN)
    return CacheHint(name, ttl if isinstance(ttl, str) else "", int(found[1]) * _UNITS[found[2]])


def _shown(value: object) -> str:
    """Text as it is, other values as JSON, both up to a length."""
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    return text if len(text) <= _MAX_CHARS else text[: _MAX_CHARS - 1] + "…"
