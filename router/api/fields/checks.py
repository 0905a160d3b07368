"""How a client's field is refused: by its name, in one sentence; what numbers and lists of token ids may be."""

import math
from array import array
from collections.abc import Mapping, Sequence

from kvcore.errors import InvalidRequestError

MAX_TOKEN_ID = (1 << 32) - 1
INT64 = 1 << 63
"""What is larger, or smaller than its negative, has no 64 bits."""
MIXED = "mixes token ids with other prompts"
_NO_ID = "has token ids that no vocabulary has"


def require(holds: bool, param: str, rule: str) -> None:
    """Raises InvalidRequestError with the field's name and its rule unless the rule `holds`."""
    if not holds:
        raise refusal(param, rule)


def refusal(param: str, rule: str) -> InvalidRequestError:
    """That the field does not keep its rule: for rules that take longer to be written than to be checked."""
    return InvalidRequestError(f"{param} {rule}", param=param)


def refuse(param: str, is_given: bool) -> None:
    """Raises InvalidRequestError where a field that is not supported `is_given`."""
    if is_given:
        raise InvalidRequestError(f"{param} is not supported by this server", param=param)


def token_ids(ids: Sequence[int], param: str = "prompt") -> list[int]:
    """A copy. Raises InvalidRequestError for an empty list, for what no vocabulary has, and for what is no id."""
    require(len(ids) > 0, param, "must not be empty")
    try:
        array("I", ids)  # a seventh of the time that looking at each takes
    except (OverflowError, TypeError) as error:
        rule = _NO_ID if isinstance(error, OverflowError) else MIXED
        raise InvalidRequestError(f"{param} {rule}", param=param) from error
    return list(ids)


def stop_ids(ids: Sequence[int], most: int) -> list[int]:
    """Of `stop_token_ids`, at most so many."""
    require(len(ids) <= most, "stop_token_ids", f"has at most {most} ids")
    return token_ids(ids, "stop_token_ids") if ids else []


def biases(given: Mapping[str, float], most: int) -> dict[int, float]:
    """Of `logit_bias`, at most so many; each is brought between -100 and 100, as vLLM does."""
    require(len(given) <= most, "logit_bias", f"has at most {most} ids")
    found: dict[int, float] = {}
    for token, bias in given.items():
        require(token.isascii() and token.isdigit() and len(token) <= 10, "logit_bias", "has token ids as keys")
        require(not math.isnan(bias), "logit_bias", "has values between -100 and 100")
        require(int(token) <= MAX_TOKEN_ID, "logit_bias", _NO_ID)
        found[int(token)] = min(100.0, max(-100.0, bias))
    return found


def allowed_ids(ids: Sequence[int]) -> list[int]:
    """Of `allowed_token_ids`, each once, in ascending order."""
    return sorted(set(token_ids(ids, "allowed_token_ids")))


def number(value: float | None, default: float, param: str, low: float, high: float) -> float:
    """Of a field that may be left out, or null. Raises InvalidRequestError."""
    if value is None:
        return default
    if not (math.isfinite(value) and low <= value <= high):
        raise refusal(param, f"must lie between {low:g} and {high:g}")
    return value


def top_p(value: float | None, default: float) -> float:
    """`default` where it is left out."""
    if value is None:
        return default
    require(0.0 < value <= 1.0, "top_p", "must be above 0 and at most 1")
    return value


def top_k(value: int | None, default: int) -> int:
    """0: all tokens. `default` where it is left out."""
    if value is None:
        return max(0, default)
    require(-1 <= value < INT64, "top_k", "must be at least 1, or 0 or -1 for all")
    return max(0, value)


def repetition_penalty(value: float | None, default: float) -> float:
    """`default` where it is left out."""
    if value is None:
        return default
    require(value > 0 and math.isfinite(value), "repetition_penalty", "must be above 0")
    return value
