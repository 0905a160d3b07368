"""FastAPI looks at the signature of every endpoint of every application. Tests make thousands of those, whose endpoints
are closures over the same code: of each code it is looked at once."""

import sys
from collections.abc import Callable
from copy import copy
from typing import Any


def look_once_a_code() -> None:
    """From now on, in this process; nothing where no such FastAPI is loaded."""
    routing: Any = sys.modules.get("fastapi.routing")
    models: Any = sys.modules.get("fastapi.dependencies.models")
    if routing is None or models is None or not hasattr(models.Dependant, "__slots__"):
        return  # of an older one, what was found holds more that is of its endpoint
    look, found = routing.get_dependant, dict[Any, Any]()

    def looked(*, path: str, call: Callable[..., Any], **more: Any) -> Any:
        if (code := getattr(call, "__code__", None)) is None or call.__defaults__ or call.__kwdefaults__:
            return look(path=path, call=call, **more)
        key = (path, code, *call.__annotations__.items(), *more.items())
        if key not in found:
            found[key] = look(path=path, call=call, **more)
        known = copy(found[key])
        known.call = call
        return known

    routing.get_dependant = looked
