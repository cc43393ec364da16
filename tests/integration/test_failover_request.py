"""Failover inside a request: whatever is wrong with the first backend, the second gets what is its own, and no more."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from mocks.control import Received
from tests.harness.backends import refusing_uri
from tests.harness.calls import CHAT, COMPLETIONS, EMBEDDINGS, INFERENCE, call, chat, error_code
from tests.harness.stack import KEY, Stack, model_of, policy_of, running_stack
from tests.harness.tls import Authority, HttpsBackend, Request, https_backend

pytestmark = pytest.mark.integration

SECRETS = {
    name: f"sk-of-{name}-5f0c9e" for name in ("first", "second", "hasty", "refusing", "plain", "strange", "other")
}
NAMES = {name: f"{name}/m" for name in SECRETS} | {"second": 'second/modèle "long" name'}
SPOOFED = "spoofed-by-client"
# What a backend may see of a request: the call's own headers, and the request id.
SEEN = {"host", "accept", "user-agent", "content-type", "content-length", "authorization", "x-request-id"}
SENT = {
    "x-api-key": KEY,
    "cookie": f"session={SPOOFED}",
    "x-hmac-signature": "ab" * 32,
    "x-router-org": SPOOFED,
    "x-router-model": SPOOFED,
    "x-router-model-span": "0:1",
    "x-router-variant": SPOOFED,
    "x-router-backend": "first",
    "x-router-fault": SPOOFED,
    "x-router-whatever": SPOOFED,
    "x-envoy-retry-on": SPOOFED,
    "x-envoy-upstream-rq-timeout-ms": "1",
    "x-forwarded-for": "203.0.113.9",
    "proxy-authorization": f"Bearer {KEY}",
    "api-key": KEY,
}


class Bench:
    """A stack with backends that are wrong in every way; ``second`` is the one that works.

    For each other backend there is a model ``<backend>-first`` that prefers it and falls back to ``second``; for
    each backend there is a model ``<backend>-only``.
    """

    def __init__(self, stack: Stack, https: dict[str, HttpsBackend]) -> None:
        self.stack = stack
        self.first, self.second = stack.mocks["a"], stack.mocks["b"]
        self.https = https

    def received(self) -> dict[str, Sequence[Received | Request]]:
        """Requests by backend."""
        return {
            "first": self.first.requests(),
            "second": self.second.requests(),
            **{name: backend.received for name, backend in self.https.items()},
        }

    def reset(self) -> None:
        self.stack.reset()
        for backend in self.https.values():
            backend.clear()


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    certificates = tmp_path_factory.mktemp("certificates")
    ours, theirs = Authority(certificates, "ours"), Authority(certificates, "theirs")
    https_certificates = {
        "trusted": ours.issue("DNS:localhost"),
        "address": ours.issue("IP:127.0.0.1"),
        "strange": theirs.issue("DNS:localhost"),
        "other": ours.issue("DNS:elsewhere.example"),
    }
    environ = {"UPSTREAM_CA_FILE": str(ours.certificate)}
    environ |= {f"{name.upper()}_KEY": secret for name, secret in SECRETS.items()}
    with ExitStack() as running:
        https = {name: running.enter_context(https_backend(c)) for name, c in https_certificates.items()}
        stack = running.enter_context(running_stack(environ=environ, workers=1))
        uris = {
            "first": f"{stack.uris['a']}/alpha",
            "second": f"{stack.uris['b'].replace('127.0.0.1', 'localhost')}/beta/v2",
            "hasty": f"{stack.uris['a']}/alpha",
            "refusing": running.enter_context(refusing_uri()),
            "plain": stack.uris["a"].replace("http:", "https:"),
            "trusted": f"https://localhost:{https['trusted'].port}/base",
            "address": f"https://127.0.0.1:{https['address'].port}/base",
            "strange": f"https://localhost:{https['strange'].port}",
            "other": f"https://localhost:{https['other'].port}",
        }
        own = {name: {"model_variant": NAMES[name], "credential": {"env": f"{name.upper()}_KEY"}} for name in SECRETS}
        stack.apply(
            policy_of(
                uris,
                backend={"timeout": "20s"},
                backend_of={**own, "hasty": {**own["first"], "timeout": "300ms"}},
                models=[
                    *(model_of({n: 100, "second": 0}, model=f"{n}-first") for n in uris if n != "second"),
                    *(model_of({n: 100}, model=f"{n}-only") for n in uris),
                ],
            )
        )
        yield Bench(stack, https)


@pytest.fixture(autouse=True)
def _fresh(bench: Bench) -> None:
    bench.reset()


@pytest.fixture
def client(bench: Bench) -> Iterator[httpx.Client]:
    with bench.stack.client() as client:
        yield client


def leaks(bench: Bench) -> list[str]:
    """Everything that a backend has seen and should not have."""
    found = []
    for name, requests in bench.received().items():
        not_its_own = {KEY, SPOOFED, SENT["x-hmac-signature"], *SECRETS.values()} - {SECRETS.get(name)}
        for request in requests:
            seen = " ".join(f"{header}: {value}" for header, value in request.headers) + request.body.decode()
            found += [f"{name} saw {text}" for text in not_its_own if text in seen]
            found += [f"{name} saw header {header}" for header, _ in request.headers if header.lower() not in SEEN]
    return found


# The kind of failure, the backend that shows it, and what its mock is told; None where it cannot but fail.
FAILURES = {
    "500": ("first", {"kind": "status", "status": 500}),
    "503": ("first", {"kind": "status", "status": 503}),
    "429": ("first", {"kind": "status", "status": 429, "headers": {"retry-after": "7"}}),
    "401": ("first", {"kind": "status", "status": 401}),
    "403": ("first", {"kind": "status", "status": 403}),
    "reset": ("first", {"kind": "reset"}),
    "closed": ("first", {"kind": "close"}),
    "hang": ("hasty", {"kind": "hang"}),
    "refused": ("refusing", None),
    "tls-to-a-plain-port": ("plain", None),
    "tls-of-an-untrusted-authority": ("strange", None),
    "tls-for-another-name": ("other", None),
}
each_failure = pytest.mark.parametrize("failure", FAILURES)


def fail_first(bench: Bench, failure: str) -> str:
    """Put a failure in force; the backend that shows it."""
    backend, fault = FAILURES[failure]
    if fault is not None:
        bench.first.fail(**fault)
    return backend


@each_failure
def test_the_second_backend_answers_and_gets_what_is_its_own(bench: Bench, client: httpx.Client, failure: str) -> None:
    wrong = fail_first(bench, failure)
    template = '{"note":"Größe 🙂", "n": 9007199254740993, "x": 0.70, "model" : @ , "messages":[{"role":"user"}]}'

    response = client.post(
        CHAT,
        content=template.replace("@", json.dumps(f"{wrong}-first")),
        headers={"content-type": "application/json", **SENT},
    )

    assert response.status_code == 200, response.text
    assert response.headers["x-routing-backend"] == "second"
    assert response.headers["x-routing-decision"] == "FAILOVER"
    assert response.json()["mock"]["backend"] == "b"
    [received] = bench.second.requests()
    assert received.path == "/beta/v2/v1/chat/completions"
    assert received.host == urlsplit(bench.stack.uris["b"]).netloc.replace("127.0.0.1", "localhost")
    assert received.all_headers("authorization") == (f"Bearer {SECRETS['second']}",)
    assert received.body.decode() == template.replace("@", json.dumps(NAMES["second"]))
    assert received.header("x-request-id") == response.headers["x-request-id"]
    assert leaks(bench) == []


@pytest.mark.parametrize("failure", [name for name, (backend, _) in FAILURES.items() if backend == "first"])
def test_the_first_backend_had_what_was_its_own(bench: Bench, client: httpx.Client, failure: str) -> None:
    fail_first(bench, failure)
    assert call(client, CHAT, "first-first").status_code == 200
    [received] = bench.first.requests()
    assert received.path == "/alpha/v1/chat/completions"
    assert received.host == urlsplit(bench.stack.uris["a"]).netloc
    assert received.all_headers("authorization") == (f"Bearer {SECRETS['first']}",)
    assert received.json() == chat(NAMES["first"])


@pytest.mark.parametrize("failure", ["tls-to-a-plain-port", "tls-of-an-untrusted-authority", "tls-for-another-name"])
def test_nothing_is_sent_to_a_backend_that_cannot_prove_its_name(
    bench: Bench, client: httpx.Client, failure: str
) -> None:
    wrong, _ = FAILURES[failure]
    response = call(client, CHAT, f"{wrong}-only")
    assert response.status_code == 502
    assert error_code(response) == "BACKEND_ERROR"
    assert [name for name, requests in bench.received().items() if requests] == []


@pytest.mark.parametrize("path", [COMPLETIONS, EMBEDDINGS, "/v1/responses"])
def test_every_openai_endpoint_fails_over_to_its_own_path(bench: Bench, client: httpx.Client, path: str) -> None:
    bench.first.fail("status", status=500)
    more = {"input": "hi"} if path == "/v1/responses" else {}
    response = call(client, path, "first-first", **more)
    assert response.status_code == 200
    assert response.headers["x-routing-decision"] == "FAILOVER"
    [received] = bench.second.requests()
    assert received.path == f"/beta/v2{path}"
    assert received.json()["model"] == NAMES["second"]


@each_failure
def test_an_inference_call_fails_over(bench: Bench, client: httpx.Client, failure: str) -> None:
    wrong = fail_first(bench, failure)
    response = call(client, INFERENCE, f"{wrong}-first", payload="Größe 🙂", parameters={"seed": 9007199254740993})
    assert response.status_code == 200, response.text
    assert response.headers["x-routing-backend"] == "second"
    assert response.headers["x-routing-decision"] == "FAILOVER"
    assert response.json()["output"]["mock"]["backend"] == "b"
    [received] = bench.second.requests()
    assert received.path == "/beta/v2/v1/completions"
    assert received.json() == {"model": NAMES["second"], "prompt": "Größe 🙂", "seed": 9007199254740993}
    assert leaks(bench) == []


@each_failure
def test_a_stream_that_has_not_begun_fails_over(bench: Bench, client: httpx.Client, failure: str) -> None:
    wrong = fail_first(bench, failure)
    with client.stream("POST", CHAT, json=chat(f"{wrong}-first", stream=True)) as response:
        text = response.read().decode()
    assert response.headers["x-routing-backend"] == "second"
    assert response.headers["x-routing-decision"] == "FAILOVER"
    assert text.endswith("data: [DONE]\n\n")
    assert '"error"' not in text


def test_a_backend_slower_than_its_timeout_keeps_the_stream_that_it_began(bench: Bench, client: httpx.Client) -> None:
    bench.first.fail("slow", event_delay_s=0.1)
    with client.stream("POST", CHAT, json=chat("hasty-first", stream=True, mock_events=6)) as response:
        text = response.read().decode()
    assert response.headers["x-routing-backend"] == "hasty"
    assert text.count('"content"') == 6
    assert text.endswith("data: [DONE]\n\n")
    assert bench.second.count() == 0


INJECTED = '"stream_options":{"include_usage":true},'

# A body with @ for the model and the place of what the router adds; the text on the left as the client sent it.
BODIES = {
    "model-first": ('{"model":@,"messages":[{"role":"user","content":"hi"}]}', None),
    "model-last": ('{"messages":[{"role":"user","content":"model"}],"model":@}', None),
    "spaces": ('\n{ "messages" : [ {"role":"user","content":"hi"} ] ,\r\n\t"model"  :\n@ }\n', None),
    "unicode-before": ('{"messages":[{"role":"user","content":"Größe 漢字 🙂"}],"model":@}', None),
    "escapes-before": (
        '{"messages":[{"role":"user","content":"\\"model\\":\\"x\\" \\ud83d\\ude42\\\\"}],"model":@}',
        None,
    ),
    "nested-models": (
        '{"metadata":{"model":"keep"},"messages":[{"role":"user","content":"hi","model":"keep"}],"model":@,'
        '"tail":[{"model":"keep"}]}',
        None,
    ),
    "escaped-key": ('{"messages":[{"role":"user","content":"hi"}],"mod\\u0065l":@}', None),
    "numbers": (
        '{"n":1,"seed":9007199254740993,"temperature":0.70,"x":1E2,"big":18446744073709551615,"model":@,'
        '"messages":[{"role":"user","content":"hi"}]}',
        None,
    ),
    "stream": ('{"messages":[{"role":"user","content":"é"}],"stream":true,"model":@}', ("{", "{" + INJECTED)),
    "stream-after-space": (
        ' { "model":@,"stream":true,"messages":[{"role":"user","content":"é"}]}',
        ("{", "{" + INJECTED),
    ),
    "stream-options-before": (
        '{"stream_options":{"include_usage":false,"é":1},"stream":true,"model":@,"messages":[{"role":"user","content":"hi"}]}',
        ('{"include_usage":false,"é":1}', '{"include_usage": true, "é": 1}'),
    ),
    "stream-options-after": (
        '{"model":@,"stream":true,"messages":[{"role":"user","content":"hi"}],"stream_options":null}',
        ("null", '{"include_usage": true}'),
    ),
    "stream-options-asked-for": (
        '{"model":@,"stream":true,"messages":[{"role":"user","content":"hi"}],"stream_options":{"include_usage":true}}',
        None,
    ),
}


@pytest.mark.parametrize("body", BODIES)
def test_only_the_model_changes_in_a_body(bench: Bench, client: httpx.Client, body: str) -> None:
    template, added = BODIES[body]
    forwarded = template.replace(*added, 1) if added else template
    bench.first.fail("status", status=500)

    response = client.post(
        CHAT,
        content=template.replace("@", '"first-first"').encode(),
        headers={"content-type": "application/json"},
    )

    assert response.status_code == 200, response.text
    for name, backend in {"first": bench.first, "second": bench.second}.items():
        [received] = backend.requests()
        assert received.body.decode() == forwarded.replace("@", json.dumps(NAMES[name]))
        assert received.header("content-length") == str(len(received.body))


def test_a_model_name_written_in_escapes_is_found_and_replaced(bench: Bench, client: httpx.Client) -> None:
    content = b'{"messages":[{"role":"user","content":"hi"}],"model":"second\\u002donly","x":1}'
    assert client.post(CHAT, content=content, headers={"content-type": "application/json"}).status_code == 200
    [received] = bench.second.requests()
    assert received.body == content.replace(b'"second\\u002donly"', json.dumps(NAMES["second"]).encode())


def test_a_backend_without_a_name_of_its_own_gets_the_body_untouched(bench: Bench, client: httpx.Client) -> None:
    content = b'{ "model":"trusted-only" ,"messages":[{"role":"user","content":"hi"}], "x": 0.70}'
    response = client.post(CHAT, content=content, headers={"content-type": "application/json", **SENT})
    assert response.status_code == 200
    [received] = bench.https["trusted"].received
    assert received.body == content
    assert "authorization" not in dict(received.headers)
    assert leaks(bench) == []


@pytest.mark.parametrize(
    ("backend", "server_name"), [("trusted", "localhost"), ("address", None)], ids=["by-name", "by-address"]
)
def test_an_https_backend_that_proves_its_name_is_used(
    bench: Bench, client: httpx.Client, backend: str, server_name: str | None
) -> None:
    for path in (CHAT, INFERENCE):
        response = call(client, path, f"{backend}-first")
        assert response.status_code == 200, response.text
        assert response.headers["x-routing-backend"] == backend
        assert response.headers["x-routing-decision"] == "PRIMARY"
    assert [request.path for request in bench.https[backend].received] == [f"/base{CHAT}", f"/base{COMPLETIONS}"]
    assert set(bench.https[backend].server_names) == {server_name}
    assert bench.second.count() == 0
    assert leaks(bench) == []


def test_a_credential_is_in_no_answer(bench: Bench, client: httpx.Client) -> None:
    for model in ("first-first", "second-only"):
        for path in (CHAT, INFERENCE):
            response = call(client, path, model)
            assert response.status_code == 200
            seen = f"{response.headers}{response.text}"
            assert [secret for secret in SECRETS.values() if secret in seen] == []


def test_a_credential_is_in_no_dump_of_any_program(bench: Bench, client: httpx.Client) -> None:
    stack = bench.stack
    pages = [
        *(f"{stack.envoy_url}{path}" for path in ("/config_dump?include_eds", "/clusters", "/stats", "/certs")),
        *(f"{stack.admin_url}{path}" for path in ("/status", "/policy", "/metrics")),
        f"{stack.metrics_url}/metrics",
        f"{stack.url}/v1/status/readyz",
    ]
    dumps = {page: httpx.get(page, trust_env=False).text for page in pages}
    assert "credential/second" in dumps[pages[0]]
    assert [page for page, text in dumps.items() for secret in SECRETS.values() if secret in text] == []


@each_failure
def test_a_credential_is_in_no_file_or_log(bench: Bench, client: httpx.Client, failure: str) -> None:
    wrong = fail_first(bench, failure)
    assert call(client, CHAT, f"{wrong}-first").status_code == 200
    files = {path: path.read_bytes() for path in bench.stack.directory.rglob("*") if path.is_file()}
    assert {"envoy.log", "xds.log", "extproc.log"} <= {path.name for path, content in files.items() if content}
    assert [path.name for path, content in files.items() for s in SECRETS.values() if s.encode() in content] == []


def test_a_provider_that_repeats_the_credential_in_its_error_is_not_shown(bench: Bench, client: httpx.Client) -> None:
    said: dict[str, Any] = {"error": {"message": f"bad key {SECRETS['second']}", "code": "invalid_api_key"}}
    for status in (401, 402, 403, 429, 500):
        bench.second.fail("status", status=status, body=said, headers={"x-said": "x"})
        for path in (CHAT, INFERENCE):
            response = call(client, path, "second-only")
            assert response.status_code == 502
            assert error_code(response) == "BACKEND_ERROR"
            assert SECRETS["second"] not in f"{response.headers}{response.text}"
