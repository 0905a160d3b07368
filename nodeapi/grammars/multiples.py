"""How much of a grammar's `multipleOf` llguidance has to look at, told from its JSON. Pure.

One value's are looked at together, remainder by remainder of their least common multiple: those of `allOf`, and of
numbers in `anyOf`. Different values' are looked at one after the other. Which is one value is told by its place: the
names of the properties, the branches and the tags that it stands in. Where a schema says it in another way, as by
`$ref` or for any property, it may be every value.
"""

import math
from collections.abc import Iterable, Mapping
from decimal import Decimal

from kvcore.errors import InvalidRequestError
from nodeapi.grammars.limits import GrammarLimits

_MOST_DECIMALS = 20
_SAME_VALUE = frozenset({"allOf", "format", "json_schema", "elements", "tags"})
"""Of schemas and of structural tags: keys under which a schema stands that is of the same value."""
_BRANCHES = ("anyOf", "oneOf")
_JOINED = frozenset({"properties", "items", "prefixItems", "allOf", *_BRANCHES})
"""Of these no branch stands by itself where another is beside it."""
Place = tuple[str | int, ...] | None
"""Of a value; None: it may be any."""


def check_multiples(schemas: Iterable[object], limits: GrammarLimits) -> None:
    """Of the JSON of one grammar. Raises InvalidRequestError where it is too much."""
    places = multiples_by_place(schemas)
    anywhere = places.pop(None, [])
    groups = [*places.values(), []]
    most, rule = limits.multiples, "the least common multiple of those of one value"
    if any(math.lcm(*_whole([*values, *anywhere], limits)) > most for values in groups):
        raise InvalidRequestError(f"multipleOf is too large: {rule} must not be over {most}")
    steps = [_whole(values, limits) for values in (*groups, anywhere)]
    if sum(max(math.lcm(*values), sum(values)) for values in steps) > 10 * most:
        raise InvalidRequestError(f"multipleOf is too large: all that it has together must not be over {10 * most}")


def multiples_by_place(schemas: Iterable[object]) -> dict[Place, list[object]]:
    """Every `multipleOf`, by the place of its value."""
    found: dict[Place, list[object]] = {}
    rest: list[tuple[object, Place, Place, bool]] = [(schema, (), (), False) for schema in schemas]
    while rest:
        # `here`: the place of the value that `schema` is of; `within`: what those of its properties and items begin
        # with, the branches included. `joined`: it holds beside others, so that branches do not set values apart.
        schema, here, within, joined = rest.pop()
        if isinstance(schema, list):
            rest += [(part, here, within, joined) for part in schema]
        if not isinstance(schema, Mapping):
            continue
        if "multipleOf" in schema:
            found.setdefault(here, []).append(schema["multipleOf"])
        apart = not joined and len(_JOINED & schema.keys()) == 1
        tag = str(schema["begin"]) if "begin" in schema and "content" in schema else None
        for key, part in schema.items():
            if key == "properties" and isinstance(part, Mapping):
                inner = [(each, _below(within, ".", str(name))) for name, each in part.items()]
                rest += [(each, place, place, joined) for each, place in inner]
            elif key in ("items", "prefixItems") or (key == "content" and tag is not None):
                place = _below(within, "[]", tag or "")
                rest.append((part, place, place, joined))
            elif key in _BRANCHES and isinstance(part, list):
                branches = [(each, _below(within, "|", number)) for number, each in enumerate(part)]
                rest += [(each, here, place if apart else within, joined) for each, place in branches]
            elif key in _SAME_VALUE:
                rest.append((part, here, within, joined or key == "allOf"))
            else:
                rest.append((part, None, None, True))
    return found


def _below(place: Place, kind: str, name: str | int) -> Place:
    return None if place is None else (*place, kind, name)


def _whole(values: Iterable[object], limits: GrammarLimits) -> list[int]:
    """In units of the last decimal that one of them has. Raises InvalidRequestError."""
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    steps = [Decimal(str(number)) for number in numbers if number > 0]
    decimals = max((-int(step.as_tuple().exponent) for step in steps if step.is_finite()), default=0)
    if decimals > _MOST_DECIMALS or any(not step.is_finite() or step > limits.multiples for step in steps):
        raise InvalidRequestError(f"multipleOf is too large: it must not be over {limits.multiples}")
    return [int(step.scaleb(max(0, decimals))) for step in steps]
