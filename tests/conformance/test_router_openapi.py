"""The router against its own OpenAPI document: whatever is sent, an answer that the document allows, never a 500."""

import asyncio

import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance
from support.router_fakes import make_rig

schema = schemathesis.openapi.from_asgi("/openapi.json", asyncio.run(make_rig()).app)


@schema.parametrize()
@settings(
    max_examples=25,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
    derandomize=True,
)
def test_no_input_breaks_the_router(case: schemathesis.Case) -> None:
    reply = case.call()
    checks = [content_type_conformance, response_schema_conformance]
    if reply.status_code != 503:
        checks.append(not_a_server_error)
    if reply.status_code >= 400:
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
    case.validate_response(reply, checks=checks)
