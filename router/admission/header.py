"""How long a first token may take, as a client says it in a header."""

import math

import msgspec
from starlette.types import Scope

from kvcore.errors import InvalidRequestError
from router.requests.spec import AnswerRequest

HEADER = "X-KVFerry-First-Token-S"
_NAME = HEADER.lower().encode()


def with_first_token(request: AnswerRequest, scope: Scope) -> AnswerRequest:
    """The request, with what its header says. Raises InvalidRequestError for what is no number of seconds above 0."""
    given = next((value for name, value in scope["headers"] if name == _NAME), None)
    if given is None:
        return request
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not (0 < seconds < math.inf):
        raise InvalidRequestError(f"{HEADER}: must be a number of seconds above 0")
    turn = msgspec.structs.replace(request.turn, client_s=seconds)
    return msgspec.structs.replace(request, turn=turn)
