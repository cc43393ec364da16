"""docs/openapi.yaml by itself: valid, and in step with the tables of the code."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from openapi_spec_validator import validate

from extproc.limit_answers import duration
from extproc.replies import refusal
from gateway.endpoints import AUDIT_PATH, HEALTHZ_PATH, MODELS_PATH, POST_ENDPOINTS, READYZ_PATH, Endpoint
from gateway.errors import REFUSALS, LimitContext, Reason, Refused
from gateway.settings import VERSION
from tests.contract.document import OURS, PATH, document


def test_document_is_valid_openapi() -> None:
    validate(document().tree)
    assert document().tree["info"]["version"] == VERSION


def test_paths_are_the_endpoints() -> None:
    paths = document().tree["paths"]
    posts = {path for path, item in paths.items() if "post" in item}
    gets = {path for path, item in paths.items() if "get" in item}
    assert posts == {endpoint.path for endpoint in POST_ENDPOINTS}
    below = {f"{MODELS_PATH}/{{model}}", f"{AUDIT_PATH}/{{request_id}}"}
    assert gets == {MODELS_PATH, AUDIT_PATH, HEALTHZ_PATH, READYZ_PATH, *below}


@pytest.mark.parametrize("form", ["Router", "OpenAI"])
def test_codes_are_those_of_the_reasons(form: str) -> None:
    expected: dict[int, set[str]] = {}
    for said in REFUSALS.values():
        expected.setdefault(said.status, set()).add(said.code if form == "Router" else said.openai_code or "")
    assert document().codes(form) == expected


def _examples(schemas: dict[str, Any]) -> Iterator[Any]:
    for name, schema in schemas.items():
        if "example" in schema:
            yield pytest.param(name, schema["example"], id=name)


@pytest.mark.parametrize(("name", "example"), list(_examples(document().tree["components"]["schemas"])))
def test_examples_are_what_they_show(name: str, example: Any) -> None:
    document().validator(f"/components/schemas/{name}").validate(example)


def test_every_component_is_used() -> None:
    text = PATH.read_text()
    for kind, named in document().tree["components"].items():
        if kind == "securitySchemes":
            continue
        unused = [name for name in named if not re.search(rf"#/components/{kind}/{name}\b", text)]
        assert unused == [], kind


def _figure(period: str | None, window: str | None) -> LimitContext:
    return LimitContext(
        subject="organization",
        unit="tokens",
        limit=1,
        current_usage=2,
        remaining=-1,
        period=period,
        window=window,
        reset_at="2026-11-25T00:00:00Z",
    )


@pytest.mark.parametrize("openai", [False, True], ids=["Router", "OpenAI"])
@pytest.mark.parametrize("reason", Reason, ids=lambda reason: reason.value)
def test_every_refusal_is_documented_for_its_status(reason: Reason, openai: bool) -> None:
    status = REFUSALS[reason].status
    limit = {402: _figure("DAILY", None), 429: _figure(None, "1m")}.get(status)
    wait_ms = 250 if status == 429 or reason is Reason.IN_PROGRESS else None
    reply = refusal(Refused(reason, limit=limit, retry_after_ms=wait_ms), openai=openai, trace_id=str(uuid.uuid4()))
    form = "OpenAI" if openai else "Router"
    document().validator(f"/components/schemas/{form}Error{status}").validate(json.loads(reply.body))


@pytest.mark.parametrize("ms", [0, 1, 999, 1000, 30_000, 59_001, 60_000, 150_000, 3_600_000, 3_605_000, 10**9])
def test_durations_are_written_as_documented(ms: int) -> None:
    document().validator("/components/headers/RateLimitReset/schema").validate(duration(ms))


def test_every_header_that_means_something_is_documented() -> None:
    tree = document().tree
    operations = [operation for item in tree["paths"].values() for operation in item.values()]
    responses = [*tree["components"]["responses"].values()]
    responses += [response for operation in operations for response in operation["responses"].values()]
    assert {name for response in responses for name in response.get("headers", {})} >= OURS


@pytest.mark.parametrize("endpoint", POST_ENDPOINTS, ids=lambda endpoint: endpoint.kind.value)
def test_every_endpoint_documents_the_statuses_of_limits_and_idempotency(endpoint: Endpoint) -> None:
    operation = document().tree["paths"][endpoint.path]["post"]
    form = "OpenAI" if endpoint.openai else "Router"
    for status in (402, 409, 422, 429):
        assert operation["responses"][str(status)] == {"$ref": f"#/components/responses/{form}{status}"}
    takes_key = {"$ref": "#/components/parameters/IdempotencyKey"} in operation["parameters"]
    assert takes_key == endpoint.openai
