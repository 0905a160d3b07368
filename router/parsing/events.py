"""What is found in a model's text."""

from collections.abc import Generator
from typing import TypeVar

import msgspec


class Content(msgspec.Struct, frozen=True):
    """Text of the answer."""

    text: str


class Reasoning(msgspec.Struct, frozen=True):
    """Text of what the model thought before it."""

    text: str


class CallBegin(msgspec.Struct, frozen=True):
    """A call of a tool begins. `id`: the model's own name for it; empty: it has none."""

    name: str
    id: str = ""


class CallArguments(msgspec.Struct, frozen=True):
    """More of the JSON text of the arguments of the call that began last."""

    text: str


class CallEnd(msgspec.Struct, frozen=True):
    """That call is whole. One whose end never comes was cut off, or the model wrote nonsense."""


Event = Content | Reasoning | CallBegin | CallArguments | CallEnd
_T = TypeVar("_T")
Parse = Generator[Event | None, None, _T]
"""Reads on: yields events, and None where it needs more text than there is."""
