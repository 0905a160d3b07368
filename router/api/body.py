"""From the bytes of a request's body to its fields: types, and no field that is not known.

Owns how errors of form are said. What a field's value may be is its schema's.
"""

import asyncio
import difflib
import gc
from collections.abc import Callable
from functools import cache
from operator import attrgetter
from typing import Annotated, TypeVar, cast

import msgspec

from kvcore.errors import InvalidRequestError, PayloadTooLargeError
from router.api.fields.other_fields import HARMLESS, REFUSED
from router.api.limits import BodyLimits

_Kind = TypeVar("_Kind", bound=msgspec.Struct)
_Made = TypeVar("_Made")
_COUNTED_AT_ONCE = 1 << 20


def parse(raw: bytes, kind: type[_Kind], limits: BodyLimits = BodyLimits()) -> _Kind:
    """Decode and check the types. A field that is not obeyed is let pass if nothing depends on it or its value asks for
    nothing. Raises InvalidRequestError with `param`, PayloadTooLargeError for too many values."""
    is_large = len(raw) > limits.small_bytes
    if is_large:
        _check_values(raw, limits)
    elif (plain := _as_documented(raw, kind)) is not None:
        return plain
    strict = strict_body(kind)
    try:
        try:
            body: _Kind = _decode_large(raw, strict) if is_large else msgspec.json.decode(raw, type=strict)
        except msgspec.ValidationError as error:
            if is_large or not any(f"got `{kind}`" in str(error) for kind in ("float", "str", "bool", "int")):
                raise
            body = msgspec.convert(_whole_numbers(msgspec.json.decode(raw)), strict, strict=False)
    except msgspec.ValidationError as error:
        raise _refusal(str(error), kind) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequestError(f"the body is not valid JSON: {error}") from error
    _check_refused(body, kind)
    return body


def _as_documented(raw: bytes, kind: type[_Kind]) -> _Kind | None:
    """Most bodies: then nothing is left to be looked at. None: another one, of which it must be said what is wrong."""
    try:
        body: _Kind = msgspec.json.decode(raw, type=documented_body(kind))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return body


async def beside_if_large(num_bytes: int, work: Callable[[], _Made], limits: BodyLimits = BodyLimits()) -> _Made:
    """What `work` makes of a body of so many bytes: of a large one beside the event loop, where others get their turn
    after milliseconds. Raises what it raises."""
    return work() if num_bytes <= limits.small_bytes else await asyncio.to_thread(work)


def _check_values(raw: bytes, limits: BodyLimits) -> None:
    """Counting bytes takes a fiftieth of what decoding the values would; no more are counted than are too many."""
    values, start = 0, 0
    while start < len(raw) and values <= limits.max_values:
        values += raw.count(b",", start, start + _COUNTED_AT_ONCE)
        start += _COUNTED_AT_ONCE
    if values > limits.max_values:
        raise PayloadTooLargeError(f"the body has over {limits.max_values} values; no more are read")
    counts = {
        "strings": ((raw.count(b'"') - raw.count(b'\\"')) // 2, limits.max_strings),
        "objects and lists": (raw.count(b"{") + raw.count(b"["), limits.max_containers),
    }
    for what, (count, most) in counts.items():
        if count > most:
            raise PayloadTooLargeError(f"the body has {count} {what}; at most {most} are read")


def _decode_large(raw: bytes, kind: type[_Kind]) -> _Kind:
    """Without collections of garbage in its midst: of all that they would look at nothing is garbage yet, and they
    would take ten times as long as the decoding."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        return msgspec.json.decode(raw, type=kind)
    finally:
        if was_on:
            gc.enable()


@cache
def strict_body(kind: type[_Kind]) -> type[_Kind]:
    """`kind` with the fields that it does not obey, and no others allowed."""
    return _extended(kind, (*HARMLESS, *REFUSED))


@cache
def documented_body(kind: type[_Kind]) -> type[_Kind]:
    """`kind` with the harmless fields: what it makes sense to send."""
    return _extended(kind, tuple(HARMLESS))


def _extended(kind: type[_Kind], names: tuple[str, ...]) -> type[_Kind]:
    described = {name: f"Ignored: {why}" for name, why in HARMLESS.items()}
    fields = [
        (name, Annotated[object, msgspec.Meta(description=described.get(name, "Refused"))], None)
        for name in names
        if name not in kind.__struct_fields__
    ]
    made = msgspec.defstruct(
        kind.__name__, fields, bases=(kind,), module=__name__, forbid_unknown_fields=True, frozen=True, kw_only=True
    )
    return cast(type[_Kind], made)


@cache
def _refused_fields(kind: type[msgspec.Struct]) -> tuple[list[str], Callable[[object], tuple[object, ...]]]:
    """Their names, and what gives the values of all: one by one takes as long as the decoding."""
    names = [name for name in REFUSED if name not in kind.__struct_fields__]
    return names, attrgetter(*names)


def _check_refused(body: msgspec.Struct, kind: type[msgspec.Struct]) -> None:
    names, values_of = _refused_fields(kind)
    values = values_of(body)
    if values.count(None) == len(values):
        return
    for name, value in zip(names, values, strict=True):
        if value is not None and value not in REFUSED[name].neutral:
            text = f"{name} is not supported by this server: {REFUSED[name].instead}"
            raise InvalidRequestError(text, param=name)


def _whole_numbers(body: object) -> object:
    """Numbers such as 3.0 as whole ones, which they are in JSON, and true as 1, as vLLM reads it where a number stands;
    not inside objects, whose meaning is another's. Numbers as texts are left to the conversion that follows."""
    if isinstance(body, dict):
        return {
            name: int(value) if value is True or value is False else _whole_number(value)
            for name, value in body.items()
        }
    return body


def _whole_number(value: object) -> object:
    if isinstance(value, list):
        return [_whole_number(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _refusal(said: str, kind: type[msgspec.Struct]) -> InvalidRequestError:
    """Of msgspec's words, the place of the field in a form that clients know."""
    text, _, path = said.partition(" - at `")
    where = path.rstrip("`").removeprefix("$").lstrip(".")
    if (missing := "missing required field `" in text) or "unknown field `" in text:
        name = text.split("`")[1]
        param = f"{where}.{name}" if where else name
        if missing:
            return InvalidRequestError(f"{text} (in {param})", param=param)
        near = [] if where else difflib.get_close_matches(name, kind.__struct_fields__, 1)
        hint = f"did you mean {near[0]}?" if near else "leave it out"
        return InvalidRequestError(f"{param} is no field that this server knows: {hint}", param=param)
    return InvalidRequestError(f"{text} (in {where})" if where else text, param=where or None)
