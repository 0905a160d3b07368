"""LMCache's values, as it reads them and as its users write them. Pure.

A value that does not fit raises ValueError, whose text says what is expected.
"""

import math
import re

from kvcore.config.fields import ByteSize
from kvcore.config.parse import parse_byte_size

_GIB = 1 << 30


def read_bool(value: object) -> bool:
    """Only `true` and `1` are true, as LMCache has it."""
    return value if isinstance(value, bool) else str(value).strip().lower() in ("true", "1")


def bool_remark(value: object) -> str:
    """A remark for what LMCache reads as false and people mean as true; else nothing."""
    meant = str(value).strip().lower() in ("yes", "on", "y", "t")
    return f" (LMCache reads {str(value).strip()!r} as false: only true and 1 are true)" if meant else ""


def read_int(value: object, least: int) -> int:
    """A whole number, as text too."""
    text = str(int(value) if isinstance(value, float) and value.is_integer() else value).strip()
    if isinstance(value, bool) or not re.fullmatch(r"-?\d{1,18}", text) or int(text) < least:
        raise ValueError(f"{value!r} is no whole number from {least}")
    return int(text)


def read_number(value: object) -> float:
    """A number from 0, as text too."""
    try:
        number = math.nan if isinstance(value, bool) else float(str(value))
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise ValueError(f"{value!r} is no number from 0")
    return number


def read_gib(value: object) -> tuple[int, str]:
    """Bytes of a number of GiB, or of a size with a unit, which LMCache itself does not read; and a remark."""
    try:
        number = read_number(value)
    except ValueError:
        number = math.nan
    if number < 1 << 20:
        return int(number * _GIB), ""
    try:
        size = parse_byte_size(value)
    except ValueError:
        size = ByteSize(0)
    if number >= 1 << 20 or not size:  # a number that large is one of bytes: no machine has as many GiB
        raise ValueError(f"{value!r} is no number of GiB such as 8 or 0.5, and no size such as 10GB or 8GiB")
    return int(size), f" (LMCache reads no unit: {str(value).strip()!r} would be a warning and no value there)"
