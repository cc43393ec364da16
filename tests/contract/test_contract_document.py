"""docs/openapi.yaml by itself: valid, and in step with the tables of the code."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from openapi_spec_validator import validate

from gateway.endpoints import HEALTHZ_PATH, MODELS_PATH, POST_ENDPOINTS, READYZ_PATH
from gateway.errors import REFUSALS
from gateway.settings import VERSION
from tests.contract.document import PATH, document


def test_document_is_valid_openapi() -> None:
    validate(document().tree)
    assert document().tree["info"]["version"] == VERSION


def test_paths_are_the_endpoints() -> None:
    paths = document().tree["paths"]
    posts = {path for path, item in paths.items() if "post" in item}
    gets = {path for path, item in paths.items() if "get" in item}
    assert posts == {endpoint.path for endpoint in POST_ENDPOINTS}
    assert gets == {MODELS_PATH, f"{MODELS_PATH}/{{model}}", HEALTHZ_PATH, READYZ_PATH}


@pytest.mark.parametrize("form", ["Router", "OpenAI"])
def test_codes_are_those_of_the_reasons(form: str) -> None:
    expected: dict[int, set[str]] = {}
    for refusal in REFUSALS.values():
        expected.setdefault(refusal.status, set()).add(refusal.code if form == "Router" else refusal.openai_code or "")
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
