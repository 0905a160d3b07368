"""Convert what YAML gives into the config's structs, keeping track of where we are.

msgspec alone would say `$.nodes[...]`; walking the structs ourselves and leaving the leaves to it lets every error
name the exact path, the value and the nearest valid key. Pure.
"""

import difflib
import math
import re
import types
from collections.abc import Mapping
from enum import Enum
from typing import Annotated, Literal, TypeGuard, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import msgspec

from kvcore.config.fields import ByteSize

T = TypeVar("T")

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
_SHOWN_CHARS = 60


class InvalidValueError(ValueError):
    """A value that does not fit its type; the text names path and value."""


def parse(raw: object, kind: type[T], path: str = "") -> T:
    """`raw` (dicts, lists and scalars) as `kind`. Raises InvalidValueError."""
    return cast(T, _convert(raw, kind, path))


def parse_byte_size(raw: object) -> ByteSize:
    """`512MiB`, `1.5 GB`, or a whole number of bytes, more than 0. Raises ValueError."""
    text = str(raw).strip() if isinstance(raw, int | str) and not isinstance(raw, bool) else ""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)", text)
    factor = _UNITS.get(match[2].upper()) if match else None
    size = float(match[1]) * factor if match and factor else 0.0
    if not 1 <= size < math.inf:
        raise ValueError("expected a positive number of bytes such as 512MiB, 2GB or 1048576")
    return ByteSize(int(size))


def _convert(raw: object, kind: object, path: str) -> object:
    if kind is ByteSize:
        try:
            return parse_byte_size(raw)
        except ValueError as error:
            raise _wrong(path, raw, str(error)) from None
    if _is_section(kind):
        return _convert_struct(raw, kind, path)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _convert_union(raw, arguments, path)
    if origin is dict:
        named = _mapping(raw, path)
        return {str(key): _convert(value, arguments[1], _join(path, str(key))) for key, value in named.items()}
    if origin is list and isinstance(raw, list) and _is_section(arguments[0]):
        return [_convert(each, arguments[0], f"{path}[{at}]") for at, each in enumerate(raw)]
    if isinstance(raw, float) and not math.isfinite(raw):
        raise _wrong(path, raw, "expected a finite number")
    try:
        return msgspec.convert(raw, type=kind)
    except msgspec.ValidationError as error:
        raise _wrong(path, raw, _explain(str(error), raw, kind)) from None


def _is_section(kind: object) -> TypeGuard[type[msgspec.Struct]]:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def _convert_struct(raw: object, kind: type[msgspec.Struct], path: str) -> msgspec.Struct:
    given = _mapping(raw, path)
    tag_field = kind.__struct_config__.tag_field
    hints = get_type_hints(kind, include_extras=True)
    fields = {field.encode_name: field for field in msgspec.structs.fields(kind)}
    for key, value in given.items():
        if key not in fields and key != tag_field:
            raise _wrong(_join(path, str(key)), value, f"unknown key{nearest(str(key), fields)}")
    for name, field in fields.items():
        if field.required and name not in given:
            raise InvalidValueError(f"{_join(path, name)}: missing")
    values = {
        field.name: _convert(given[name], hints[field.name], _join(path, name))
        for name, field in fields.items()
        if name in given
    }
    return kind(**values)


def _convert_union(raw: object, arguments: tuple[object, ...], path: str) -> object:
    structs = [kind for kind in arguments if isinstance(kind, type) and issubclass(kind, msgspec.Struct)]
    if raw is None and type(None) in arguments:
        return None
    if not structs:
        plain = [kind for kind in arguments if kind is not type(None)]
        if len(plain) == 1:
            return _convert(raw, plain[0], path)
        if isinstance(raw, bool) and bool in plain:
            return raw
        return _convert(raw, next(kind for kind in plain if kind is not bool), path)  # true, false or a word
    if len(structs) == 1:  # a section that may be left out
        return _convert_struct(raw, structs[0], path)
    by_tag = {str(kind.__struct_config__.tag): kind for kind in structs}
    tag_field = str(structs[0].__struct_config__.tag_field)
    given = _mapping(raw, path)
    if tag_field not in given:
        raise InvalidValueError(f"{_join(path, tag_field)}: missing (one of {', '.join(by_tag)})")
    tag = str(given[tag_field])
    if tag not in by_tag:
        raise InvalidValueError(f"{_join(path, tag_field)}: unknown kind {tag!r}{nearest(tag, by_tag)}")
    return _convert_struct(raw, by_tag[tag], path)


def _mapping(raw: object, path: str) -> Mapping[str, object]:
    if not isinstance(raw, dict):
        raise _wrong(path, raw, "expected a section (key: value lines)")
    return raw


def _wrong(path: str, raw: object, reason: str) -> InvalidValueError:
    if path.split(".", maxsplit=1)[0] == "security":  # a secret that somebody wrote into the file itself is not shown
        return InvalidValueError(f"{path}: {reason}")
    shown = repr(raw)
    shown = shown if len(shown) <= _SHOWN_CHARS else shown[:_SHOWN_CHARS] + "..."
    return InvalidValueError(f"{path or 'the file'}: {shown}: {reason}")


def _explain(message: str, raw: object, kind: object) -> str:
    """msgspec's sentence, in ours, with the choices of an enum."""
    bare = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    choices: list[str] = []
    if isinstance(bare, type) and issubclass(bare, Enum):
        choices = [str(member) for member in bare]
    elif get_origin(bare) is Literal:
        choices = [str(choice) for choice in get_args(bare)]
    if choices:
        return "not valid" + nearest(str(raw), choices)
    return message[:1].lower() + message[1:].replace("`", "")


def nearest(word: str, known: Mapping[str, object] | list[str]) -> str:
    """` (did you mean x?)` or ` (known: a, b, c)`."""
    near = difflib.get_close_matches(word, list(known), 1)
    return f" (did you mean {near[0]}?)" if near else f" (known: {', '.join(known)})"


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
