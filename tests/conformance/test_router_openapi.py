"""The router against its own OpenAPI document: whatever is sent, an answer that the document allows, never a 500."""

import asyncio

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from jsonschema_rs import ValidationError
from schemathesis.checks import not_a_server_error
from schemathesis.python.asgi import get_client
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance
from support.openapi_cases import operation_tests
from support.router_fakes import make_rig

from router.api.fields.batch_fields import BatchBody
from router.api.fields.chat_fields import ChatRequest
from router.api.fields.completion_fields import CompletionRequest
from router.api.fields.other_fields import HARMLESS
from router.api.tokens_in.request import GenerateBody


def _send(case: schemathesis.Case) -> None:
    with get_client(case.operation.app) as client:
        client.trust_env = False  # it looks for no proxy, which took a sixth of the time
        reply = case.call(session=client, timeout=60)
    checks = [content_type_conformance, response_schema_conformance]
    if reply.status_code != 503:
        checks.append(not_a_server_error)
    if reply.status_code >= 400:
        anthropic = case.operation.path.startswith("/v1/messages")
        wanted = {"message", "type"} if anthropic else {"message", "type", "param", "code"}
        assert set(reply.json()["error"]) == wanted
    case.validate_response(reply, checks=checks)


def test_the_document_is_valid_and_has_every_field_that_is_taken() -> None:
    document = schemathesis.openapi.from_asgi("/openapi.json", asyncio.run(make_rig()).app)
    document.validate()
    with pytest.raises(ValidationError, match="is not of type"):
        schemathesis.openapi.from_dict({**document.raw_schema, "paths": []}).validate()
    bodies = {
        "/v1/chat/completions": ChatRequest,
        "/v1/chat/completions/batch": BatchBody,
        "/v1/completions": CompletionRequest,
        "/inference/v1/generate": GenerateBody,
    }
    for path, kind in bodies.items():
        content = document.raw_schema["paths"][path]["post"]["requestBody"]["content"]
        named = content["application/json"]["schema"]["properties"].keys()
        assert named == {*kind.__struct_fields__, *HARMLESS}, path


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("nth", "edges_of_same_bodies", "drawn"),
    [pytest.param(1, True, 25, marks=pytest.mark.slow, id="all"), pytest.param(20, False, 1, id="some")],
)
def test_no_input_breaks_the_router(
    nth: int, edges_of_same_bodies: bool, drawn: int, subtests: pytest.Subtests
) -> None:
    send = settings(
        max_examples=drawn,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
        derandomize=True,
    )(_send)
    document = schemathesis.openapi.from_asgi("/openapi.json", asyncio.run(make_rig()).app)
    for operation, fuzz in operation_tests(document, send, nth=nth, edges_of_same_bodies=edges_of_same_bodies):
        with subtests.test(operation):
            fuzz()
