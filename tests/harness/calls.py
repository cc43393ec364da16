"""Bodies of calls, and the errors that answer them in either format."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from typing import Any
from urllib.parse import urlsplit

import httpx

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
EMBEDDINGS = "/v1/embeddings"
INFERENCE = "/v1/inference"


def chat(model: str = "gpt-4o", **fields: Any) -> dict[str, Any]:
    """A chat call."""
    return {"model": model, "messages": [{"role": "user", "content": "hi"}], **fields}


def inference(model: str = "gpt-4o", **fields: Any) -> dict[str, Any]:
    """A call in the router's own schema."""
    return {"request_id": str(uuid.uuid4()), "model": model, "payload": "hi", **fields}


def call(client: httpx.Client, path: str, model: str = "gpt-4o", **fields: Any) -> httpx.Response:
    """A call of either kind that states only what matters."""
    match path:
        case "/v1/inference":
            body = inference(model, **fields)
        case "/v1/embeddings":
            body = {"model": model, "input": "hi", **fields}
        case "/v1/completions":
            body = {"model": model, "prompt": "hi", **fields}
        case _:
            body = chat(model, **fields)
    return client.post(path, json=body)


def burst(url: str, path: str, body: Mapping[str, Any], *, key: str, count: int) -> list[tuple[int, Mapping[str, str]]]:
    """Send one call so many times over a few connections: each answer's status, and headers by lower-case name.

    http.client, because a test of shares is to spend its time on the router and not on its own client.
    """
    connections = 4
    content = json.dumps(body).encode()
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}

    def send(times: int) -> list[tuple[int, Mapping[str, str]]]:
        connection = HTTPConnection(urlsplit(url).netloc, timeout=30)
        answers = []
        for _ in range(times):
            connection.request("POST", path, content, headers)
            response = connection.getresponse()
            response.read()
            answers.append((response.status, {name.lower(): value for name, value in response.getheaders()}))
        connection.close()
        return answers

    shares = [count // connections + (index < count % connections) for index in range(connections)]
    with ThreadPoolExecutor(connections) as pool:
        return [answer for answers in pool.map(send, shares) for answer in answers]


def error_code(response: httpx.Response) -> str:
    """The error's code as /v1/inference spells it, once the format of the path has been checked."""
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    body = response.json()
    if response.request.url.path == INFERENCE:
        assert set(body) >= {"error", "code", "trace_id"}, body
        assert isinstance(body["error"], str)
        return str(body["code"])
    assert set(body) == {"error"}, body
    assert set(body["error"]) == {"message", "type", "param", "code"}, body
    return str(body["error"]["code"]).upper()
