"""Envoy's spans reach an OTLP collector, and the ids in responses and logs are theirs."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from tests.harness.process import eventually
from tests.harness.stack import Stack, running_stack

pytestmark = pytest.mark.integration

PARENT = "0af7651916cd43dd8448eb211c80319c"


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps the spans it is sent."""

    def __init__(self) -> None:
        self._spans: list[Any] = []
        self._lock = threading.Lock()

    def Export(self, request: Any, context: Any) -> Any:
        with self._lock:
            self._spans += [s for r in request.resource_spans for scope in r.scope_spans for s in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()

    def spans(self, trace_id: str) -> list[Any]:
        with self._lock:
            return [span for span in self._spans if span.trace_id.hex() == trace_id]


@pytest.fixture(scope="module")
def collector() -> Iterator[tuple[Collector, int]]:
    server = grpc.server(futures.ThreadPoolExecutor(2))
    servicer = Collector()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield servicer, port
    server.stop(0)


@pytest.fixture(scope="module")
def stack(collector: tuple[Collector, int]) -> Iterator[Stack]:
    endpoint = f"http://127.0.0.1:{collector[1]}"
    with running_stack(workers=1, environ={"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint}) as running:
        yield running


def test_an_inference_answers_with_the_trace_that_the_collector_gets(
    stack: Stack, collector: tuple[Collector, int]
) -> None:
    call = {"request_id": "123e4567-e89b-12d3-a456-426614174000", "model": "gpt-4o", "payload": "hi"}
    with stack.client() as client:
        answer = client.post("/v1/inference", json=call).json()
    assert len(answer["trace_id"]) == 32
    assert len(answer["span_id"]) == 16
    eventually(lambda: len(collector[0].spans(answer["trace_id"])) >= 2, "spans of the request arrive")


def test_a_clients_trace_goes_on_to_the_backend(stack: Stack, collector: tuple[Collector, int]) -> None:
    stack.reset()
    header = {"traceparent": f"00-{PARENT}-b7ad6b7169203331-01"}
    with stack.client() as client:
        client.post("/v1/completions", json={"model": "gpt-4o", "prompt": "hi"}, headers=header)
    [received] = [request for mock in stack.mocks.values() for request in mock.requests()]
    assert (received.header("traceparent") or "").split("-")[1] == PARENT
    eventually(lambda: collector[0].spans(PARENT), "spans of the client's trace arrive")


def test_a_refusal_carries_the_trace_id(stack: Stack) -> None:
    header = {"traceparent": f"00-{PARENT}-b7ad6b7169203331-01", "content-type": "application/json"}
    with stack.client() as client:
        error = client.post("/v1/inference", content=b"{", headers=header).json()
    assert error["trace_id"] == PARENT


def test_envoys_own_error_carries_the_request_id_that_its_span_has(
    stack: Stack, collector: tuple[Collector, int]
) -> None:
    header = {"traceparent": f"00-{PARENT}-b7ad6b7169203331-01"}
    with stack.client() as client:
        response = client.get("/nothing", headers=header)
    request_id = response.headers["x-request-id"]
    assert response.json()["trace_id"] == request_id

    def in_a_span() -> bool:
        return any(request_id in str(span.attributes) for span in collector[0].spans(PARENT))

    eventually(in_a_span, "a span has the request id")


def test_the_access_log_has_request_and_trace_id(stack: Stack) -> None:
    header = {"traceparent": f"00-{PARENT}-b7ad6b7169203331-01"}
    with stack.client() as client:
        response = client.post("/v1/completions", json={"model": "gpt-4o", "prompt": "hi"}, headers=header)
    request_id = response.headers["x-request-id"]
    eventually(lambda: request_id in stack.envoy.log(), "the request is logged")
    [line] = [json.loads(line) for line in stack.envoy.log().splitlines() if request_id in line]
    assert line["trace_id"] == PARENT
    assert line["api_key_id"] == "dev-acme-alice"
    assert line["tokens_input"] == 1
