"""Health as grpc's own client asks for it."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from extproc.health import CHECK, Health
from tests.unit.extproc.http2_serving import Served, echo, serving

_SAYS = health_pb2.HealthCheckResponse


@pytest.fixture
def health() -> Health:
    return Health("a.Service")


@pytest.fixture
def served(health: Health) -> Iterator[Served]:
    with serving(echo, paths={CHECK.decode(): health.check}) as running:
        yield running


def _ask(served: Served, service: str) -> int:
    with served.channel() as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=20, wait_for_ready=True)
        return int(answer.status)


@pytest.mark.parametrize("service", ["", "a.Service"])
def test_a_service_serves_from_when_it_says_so_until_it_says_otherwise(
    service: str, health: Health, served: Served
) -> None:
    assert _ask(served, service) == _SAYS.NOT_SERVING
    health.serving = True
    assert _ask(served, service) == _SAYS.SERVING
    health.serving = False
    assert _ask(served, service) == _SAYS.NOT_SERVING


def test_an_unknown_service_is_not_found(served: Served) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        _ask(served, "another.Service")
    assert raised.value.code() is grpc.StatusCode.NOT_FOUND


def test_watch_is_not_offered(served: Served) -> None:
    with served.channel() as channel, pytest.raises(grpc.RpcError) as raised:
        next(health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=20))
    assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_question_that_cannot_be_read_costs_its_call_alone(health: Health, served: Served) -> None:
    health.serving = True
    with served.channel() as channel, pytest.raises(grpc.RpcError) as raised:
        channel.unary_unary(CHECK.decode())(b"\xff\xff", timeout=20, wait_for_ready=True)
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert _ask(served, "") == _SAYS.SERVING
