"""What of a grammar llguidance may look at for hours, without a bound of its own: told from the text. Pure.

Whether any text can follow a pattern is found by walking its states. For `multipleOf` that is one a remainder, and as
many as their least common multiple where several meet; for patterns in Lark joined by `&`, or turned round by `~`, as
many as 2 to the power of their length.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal

from kvcore.errors import InvalidRequestError
from nodeapi.grammars.limits import GrammarLimits

_BESIDE_CODE = re.compile(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|#[^\n]*|/(?:\\.|[^/\\\n])+/')
"""Of Lark: texts, comments and regular expressions."""
_TURNED = re.compile(r"&|~(?!\s*[0-9])")
"""`~` before a number repeats."""
_MOST_DECIMALS = 20
_DECODER = json.JSONDecoder()


def check_multiples(values: Iterable[object], limits: GrammarLimits) -> None:
    """Of all `multipleOf` in one grammar. Raises InvalidRequestError where they are too much to look at together."""
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    steps = [Decimal(str(number)) for number in numbers if number > 0]
    decimals = max((-int(step.as_tuple().exponent) for step in steps if step.is_finite()), default=0)
    beyond = decimals > _MOST_DECIMALS or any(not step.is_finite() or step > limits.multiples for step in steps)
    whole = [] if beyond else [int(step.scaleb(max(0, decimals))) for step in steps]
    if beyond or math.lcm(*whole) > limits.multiples or sum(whole) > 10 * limits.multiples:
        rule = "the least common multiple of all that it has"
        raise InvalidRequestError(f"multipleOf is too large: {rule} must not be over {limits.multiples}")


def check_lark(text: str, limits: GrammarLimits) -> None:
    """Raises InvalidRequestError with what of it is not supported, or too large."""
    if found := _TURNED.search(_BESIDE_CODE.sub(" ", text)):
        raise InvalidRequestError(f"{found[0]} between or before patterns is not supported")
    check_multiples((value for schema in _schemas_in(text) for value in multiples_in(schema)), limits)


def multiples_in(value: object) -> Iterator[object]:
    """Every `multipleOf` in a JSON value."""
    rest = [value]
    while rest:
        match rest.pop():
            case Mapping() as found:
                if "multipleOf" in found:
                    yield found["multipleOf"]
                rest += found.values()
            case list() as items:
                rest += items


def _schemas_in(text: str) -> Iterator[object]:
    """What stands behind `%json`, where it is JSON."""
    for found in re.finditer(r"%json\s*", text):
        try:
            yield _DECODER.raw_decode(text, found.end())[0]
        except (ValueError, RecursionError):
            continue
