"""Schemathesis' cases of an OpenAPI document, made when a test runs.

Its own decorator makes thousands when tests are collected, and each of pytest's workers collects all tests.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any

import schemathesis
from schemathesis.checks import load_all_checks
from schemathesis.core.result import Ok
from schemathesis.pytest.lazy import get_all_tests
from schemathesis.schemas import BaseSchema

EXAMPLES = "hypothesis_explicit_examples"


def operation_tests(
    document: BaseSchema,
    send: Callable[[schemathesis.Case[Any]], None],
    *,
    nth: int = 1,
    nth_of_same_bodies: int = 1,
) -> Iterator[tuple[str, Callable[[], None]]]:
    """Of each operation its name, and what gives `send` case after case: edges of each schema, then drawn ones.

    Of the edges of a body one in `nth`; where an operation before it takes the same, word for word, one in
    `nth_of_same_bodies`.
    """
    load_all_checks()
    bodies = set[str]()
    for made in get_all_tests(schema=document, test_func=send, settings=None, given_kwargs=None):
        assert isinstance(made, Ok), made
        operation, test = made.ok()
        body = json.dumps(operation.definition.raw.get("requestBody"), sort_keys=True)
        if body != "null":
            step = nth_of_same_bodies if body in bodies else nth
            setattr(test, EXAMPLES, getattr(test, EXAMPLES)[::step])
        bodies.add(body)
        yield operation.label, test
