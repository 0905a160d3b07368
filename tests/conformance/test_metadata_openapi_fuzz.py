"""Schemathesis over the metadata server's own OpenAPI document, in process: no 5xx, every answer is described."""

import msgspec
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from support.metadata_words import new_state
from support.openapi_cases import operation_tests

from kvcore.clock import SystemClock
from kvcore.telemetry import Metrics
from metadata_server.core import MetadataCore
from metadata_server.shell.app import create_app

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@schemathesis.serializer("application/msgpack")
def raw_bytes(_context, value):
    """Whatever was drawn, as it is: mostly no msgpack at all."""
    return value if isinstance(value, bytes) else msgspec.msgpack.encode(getattr(value, "data", str(value)))


def document() -> schemathesis.schemas.BaseSchema:
    clock = SystemClock()
    core = MetadataCore(new_state(), clock)
    core.stop()  # long polls answer at once and event streams end: there is nobody to wait for
    return schemathesis.openapi.from_asgi("/openapi.json", create_app(core, clock, Metrics(), 1 << 20))


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def send(case):
    response = case.call_and_validate(checks=CHECKS, timeout=60)
    if response.status_code >= 400:
        is_json = response.headers["content-type"][0].startswith("application/json")
        error = (msgspec.json if is_json else msgspec.msgpack).decode(response.content)["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_no_request_gets_an_undescribed_answer(subtests: pytest.Subtests):
    for operation, fuzz in operation_tests(document(), send):
        with subtests.test(operation):
            fuzz()
