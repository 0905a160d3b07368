"""What of a grammar llguidance may look at for hours, without a bound of its own: told from the text. Pure.

Whether any text can follow a pattern is found by walking its states. For `multipleOf` see `multiples`; for patterns in
Lark joined by `&`, or turned round by `~`, they are as many as 2 to the power of their length.
"""

import json
import re
from collections.abc import Iterator

from kvcore.errors import InvalidRequestError
from nodeapi.grammars.limits import GrammarLimits
from nodeapi.grammars.multiples import check_multiples

_BESIDE_CODE = re.compile(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|#[^\n]*|/(?:\\.|[^/\\\n])+/')
"""Of Lark: texts, comments and regular expressions."""
_TURNED = re.compile(r"&|~(?!\s*[0-9])")
"""`~` before a number repeats."""
_DECODER = json.JSONDecoder()


def check_lark(text: str, limits: GrammarLimits) -> None:
    """Raises InvalidRequestError with what of it is not supported, or too large."""
    if found := _TURNED.search(_BESIDE_CODE.sub(" ", text)):
        raise InvalidRequestError(f"{found[0]} between or before patterns is not supported")
    check_multiples(_schemas_in(text), limits)


def _schemas_in(text: str) -> Iterator[object]:
    """What stands behind `%json`, where it is JSON."""
    for found in re.finditer(r"%json\s*", text):
        try:
            yield _DECODER.raw_decode(text, found.end())[0]
        except (ValueError, RecursionError):
            continue
