"""Requests that schemathesis makes from the schema: every status that comes is documented, and none is a fault."""

import pytest
import schemathesis
from doubles import EngineDouble, chat_template, keeping, served
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from serving.app import permission_of

EXAMPLES = 4
CHECKS = [
    schemathesis.checks.not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    template, folder = chat_template(), tmp_path_factory.mktemp("batches")
    app = keeping(folder, EngineDouble(tokenizer=template.tokenizer, reach=256), chat=template)
    yield app
    app.state.service.engine.stop()


@pytest.fixture(scope="module")
def encoder():
    app = served(EngineDouble(encoder=True))
    yield app
    app.state.service.engine.stop()


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_no_undocumented_status_and_no_fault(kind, request):
    schema = schemathesis.openapi.from_asgi("/openapi.json", request.getfixturevalue(kind))
    schema = schema.exclude(path="/drain")  # after it, everything would be refused
    if kind == "encoder":
        schema = schema.include(path="/v1/embeddings")
    tried = 0
    for operation in (found.ok() for found in schema.get_all_operations()):

        @settings(
            max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate]
        )
        @given(case=operation.as_strategy())
        def check(case):
            case.call_and_validate(checks=CHECKS)

        check()
        tried += 1
    assert tried == (1 if kind == "encoder" else 26)


def test_every_route_has_a_permission_and_documents_its_errors(decoder):
    schema = schemathesis.openapi.from_asgi("/openapi.json", decoder).raw_schema
    for route in decoder.routes:
        assert permission_of(route)
        for method in route.methods:
            statuses = schema["paths"][route.path_format][method.lower()]["responses"].keys()
            assert "200" in statuses
            assert "422" not in statuses
            if permission_of(route) != "public":
                assert {"401", "403", "429", "500", "503"} <= statuses
