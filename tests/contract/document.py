"""docs/openapi.yaml as a judge of real responses: picks what is documented for one, and checks it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import yaml
from jsonschema import Draft202012Validator
from referencing import Registry
from referencing.jsonschema import DRAFT202012

from gateway import names

PATH = Path(__file__).parents[2] / "docs" / "openapi.yaml"
OURS = frozenset(
    {
        names.HEADER_ROUTING_BACKEND,
        names.HEADER_ROUTING_DECISION,
        names.HEADER_OVERHEAD_MS,
        names.HEADER_WARNING,
        names.HEADER_RETRY_AFTER,
        names.HEADER_RETRY_AFTER_MS,
        names.HEADER_SHOULD_RETRY,
        names.HEADER_IDEMPOTENT_REPLAY,
        *names.RATE_LIMIT_HEADERS,
    }
)
"""Response headers that mean something here: none of them comes where it is not documented."""
ADVICE = frozenset({names.HEADER_RETRY_AFTER, names.HEADER_RETRY_AFTER_MS, names.HEADER_SHOULD_RETRY})
"""What a backend may say too, of its own answer."""
_URI = "urn:openapi"


class Undocumented(AssertionError):
    """A response that the document does not know."""


class Document:
    """The parsed document."""

    def __init__(self, text: str) -> None:
        self.tree: dict[str, Any] = yaml.safe_load(text)
        resource = DRAFT202012.create_resource(self.tree)
        self._registry: Registry[Any] = Registry().with_resource(_URI, resource)

    def validator(self, pointer: str) -> Draft202012Validator:
        """Validator of the schema at a JSON pointer, such as ``/components/schemas/Model``."""
        return Draft202012Validator({"$ref": f"{_URI}#{pointer}"}, registry=self._registry)

    def check(self, response: httpx.Response) -> None:
        """Hold a response against what is documented for its method, path, status and content type.

        Raises:
            AssertionError: it is not documented, or it differs.
        """
        pointer, documented = self._response(response)
        self._check_headers(documented.get("headers", {}), pointer, response.headers)
        content = documented["content"]
        media_type = response.headers.get("content-type", "").partition(";")[0]
        if media_type not in content:
            raise Undocumented(f"{pointer}: content type {media_type!r}")
        at = f"{pointer}/content/{_escaped(media_type)}"
        if media_type == "text/event-stream":
            for event in events(response.text):
                self._check(f"{at}/x-event-schema", event)
        else:
            self._check(f"{at}/schema", response.json())

    def _check(self, pointer: str, instance: Any) -> None:
        problems = [f"{e.json_path}: {e.message}" for e in self.validator(pointer).iter_errors(instance)]
        assert not problems, f"{pointer}\n{instance}\n" + "\n".join(problems)

    def _check_headers(self, headers: Mapping[str, Any], pointer: str, said: httpx.Headers) -> None:
        theirs = ADVICE if names.HEADER_ROUTING_BACKEND in said else frozenset()
        unknown = OURS.intersection(said) - headers.keys() - theirs
        assert not unknown, f"{pointer}: {unknown} are not documented"
        for name, entry in headers.items():
            header = self._deref(entry)
            unless = header.get("x-required-unless")
            if name in theirs or (unless and unless in said):
                continue
            if name not in said:
                required = unless or header.get("required")
                assert not required, f"{pointer}: no {name} header"
                continue
            number = header["schema"].get("type") == "number"
            schema_at = f"{entry['$ref'][1:]}/schema" if "$ref" in entry else f"{pointer}/headers/{name}/schema"
            self._check(schema_at, _decimal(said[name]) if number else said[name])

    def _response(self, response: httpx.Response) -> tuple[str, dict[str, Any]]:
        method, path = response.request.method.lower(), response.request.url.path
        template = next((t for t in self.tree["paths"] if _matches(t, path)), None)
        operation = self.tree["paths"].get(template, {}).get(method)
        if operation is None:
            raise Undocumented(f"{method} {path}")
        status = str(response.status_code)
        for key in (status, f"{status[0]}XX"):
            if key in operation["responses"]:
                found = operation["responses"][key]
                if "$ref" in found:
                    return found["$ref"][1:], self._deref(found)
                return f"/paths/{_escaped(template or '')}/{method}/responses/{key}", found
        raise Undocumented(f"{method} {path}: status {status}\n{response.text}")

    def _deref(self, node: dict[str, Any]) -> dict[str, Any]:
        if "$ref" not in node:
            return node
        found: Any = self.tree
        for step in node["$ref"].removeprefix("#/").split("/"):
            found = found[step]
        return found  # type: ignore[no-any-return]

    def codes(self, form: str) -> dict[int, set[str]]:
        """Documented error codes by status; ``form`` is ``Router`` or ``OpenAI``."""
        found: dict[int, set[str]] = {}
        for name, schema in self.tree["components"]["schemas"].items():
            if match := re.fullmatch(rf"{form}Error(\d+)", name):
                properties = schema["allOf"][1]["properties"]
                code = properties["code"] if form == "Router" else properties["error"]["properties"]["code"]
                found[int(match[1])] = set(code["enum"])
        return found


@cache
def document() -> Document:
    """The repository's own."""
    return Document(PATH.read_text())


def events(text: str) -> Iterator[Any]:
    """JSON of each event of a stream; ``[DONE]`` must be the last one if it is there."""
    assert text.endswith("\n\n"), "the stream ends within an event"
    blocks = text.split("\n\n")[:-1]
    for number, block in enumerate(blocks):
        lines = [line for line in block.splitlines() if not line.startswith((":", "event:"))]
        data = "\n".join(line.removeprefix("data:").strip() for line in lines)
        if data == "[DONE]":
            assert number == len(blocks) - 1, "an event after [DONE]"
        elif lines:
            yield json.loads(data)


def _decimal(value: str) -> float:
    assert re.fullmatch(r"\d+(\.\d+)?", value), f"{value!r} is not a decimal number"
    return float(value)


def _matches(template: str, path: str) -> bool:
    return re.fullmatch(re.sub(r"\{\w+\}", ".+", template), path) is not None


def _escaped(step: str) -> str:
    # A JSON pointer within a URI fragment.
    return step.replace("~", "~0").replace("/", "~1").replace("{", "%7B").replace("}", "%7D")
