"""Whatever the OpenAPI document allows, and much that it does not: nothing is a 500."""

import hypothesis
import pytest
import schemathesis
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [
    not_a_server_error, status_code_conformance, content_type_conformance,
    response_schema_conformance,
]  # fmt: skip
ROUTES = [
    ("POST", "/v1/chat/completions"), ("POST", "/v1/completions"), ("POST", "/v1/responses"),
    ("POST", "/tokenize"),
    ("GET", "/v1/models"), ("GET", "/v1/models/{model}"),
    ("GET", "/health"), ("GET", "/ready"), ("GET", "/metrics"), ("GET", "/version"),
]  # fmt: skip


@pytest.fixture(scope="module")
def document(server):
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def test_every_route_is_tried(document):
    found = [(each.ok().method.upper(), each.ok().path) for each in document.get_all_operations()]
    assert sorted(found) == sorted(ROUTES)


# There is nothing to get wrong about the other routes.
TRIES = [(*route, GenerationMode.POSITIVE) for route in ROUTES]
TRIES += [(*route, GenerationMode.NEGATIVE) for route in ROUTES if route[0] == "POST"]


@pytest.mark.parametrize(("method", "path", "mode"), TRIES)
def test_a_route_keeps_to_its_document(document, method, path, mode):
    operation = document[path][method]
    tries = {"/v1/chat/completions": 25}.get(path, 20 if method == "POST" else 8)

    @hypothesis.settings(
        max_examples=tries, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    def try_it(case):
        case.call_and_validate(checks=CHECKS, timeout=30)

    try_it()
