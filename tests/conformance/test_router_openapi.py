"""The router against its own OpenAPI document: whatever is sent, an answer that the document allows, never a 500."""

import asyncio

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance
from support.openapi_cases import operation_tests
from support.router_fakes import make_rig


@settings(
    max_examples=25,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
    derandomize=True,
)
def send(case: schemathesis.Case) -> None:
    reply = case.call(timeout=60)
    checks = [content_type_conformance, response_schema_conformance]
    if reply.status_code != 503:
        checks.append(not_a_server_error)
    if reply.status_code >= 400:
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
    case.validate_response(reply, checks=checks)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("nth_of_same_bodies", [pytest.param(1, marks=pytest.mark.slow), 12])
def test_no_input_breaks_the_router(nth_of_same_bodies: int, subtests: pytest.Subtests) -> None:
    document = schemathesis.openapi.from_asgi("/openapi.json", asyncio.run(make_rig()).app)
    for operation, fuzz in operation_tests(document, send, nth_of_same_bodies=nth_of_same_bodies):
        with subtests.test(operation):
            fuzz()
