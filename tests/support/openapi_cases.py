"""Schemathesis' cases of an OpenAPI document, made when a test runs.

Its own decorator makes thousands when tests are collected, and each of pytest's workers collects all tests.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any

import schemathesis
from schemathesis.checks import load_all_checks
from schemathesis.core.result import Ok
from schemathesis.generation.feedback import FeedbackSources
from schemathesis.pytest._test_builder import build_operation_test
from schemathesis.python._constants.orchestrator import make_constants_value_source
from schemathesis.schemas import BaseSchema

EXAMPLES = "hypothesis_explicit_examples"


def operation_tests(
    document: BaseSchema,
    send: Callable[[schemathesis.Case[Any]], None],
    *,
    nth: int = 1,
    edges_of_same_bodies: bool = True,
) -> Iterator[tuple[str, Callable[[], None]]]:
    """Of each operation its name, and what gives `send` case after case: edges of each schema, then drawn ones.

    Of the edges of a body one in `nth`; none, but for `edges_of_same_bodies`, where an operation before it takes the
    same, word for word: to make them takes longer than to send them.
    """
    load_all_checks()
    bodies = set[str]()
    feedback = FeedbackSources(constants_value_source=make_constants_value_source(document))
    for made in document.get_all_operations():
        assert isinstance(made, Ok), made
        operation = made.ok()
        body = json.dumps(operation.definition.raw.get("requestBody"), sort_keys=True)
        has_edges = edges_of_same_bodies or body == "null" or body not in bodies
        document.config.phases.coverage.enabled = has_edges
        test = build_operation_test(
            config=document.config, operation=operation, test_func=send, given_kwargs={}, feedback=feedback
        )
        if body != "null" and has_edges:
            setattr(test, EXAMPLES, getattr(test, EXAMPLES)[::nth])
        bodies.add(body)
        yield operation.label, test
