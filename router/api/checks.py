"""How a client's field is refused: by its name, in one sentence."""

from kvcore.errors import InvalidRequestError


def require(holds: bool, param: str, rule: str) -> None:
    """Raises InvalidRequestError with the field's name and its rule unless the rule `holds`."""
    if not holds:
        raise InvalidRequestError(f"{param} {rule}", param=param)


def refuse(param: str, is_given: bool) -> None:
    """Raises InvalidRequestError where a field that is not supported `is_given`."""
    if is_given:
        raise InvalidRequestError(f"{param} is not supported by this server", param=param)
