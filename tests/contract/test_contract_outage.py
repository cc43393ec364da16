"""What clients are told while ext_proc is away."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from tests.contract.conftest import World
from tests.contract.produce import EVENTS, READ
from tests.harness.calls import call
from tests.harness.process import eventually

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def outage(world: World) -> Iterator[World]:
    world.stack.extproc.stop()
    try:
        yield world
    finally:
        world.stack.extproc.start()
        eventually(lambda: (r := world.stack.readyz()) is not None and r.status_code == 200, "ext_proc is back")


@pytest.mark.parametrize("path", ["/v1/inference", "/v1/chat/completions", "/v1/embeddings", "/v1/models", EVENTS])
def test_endpoints_fail_closed(outage: World, path: str) -> None:
    openai = path not in {"/v1/inference", EVENTS}
    with outage.client() as client:
        response = client.get(path) if path in READ else call(client, path)
    assert response.status_code == 503
    outage.check(response)
    outage.check_error(response, openai=openai, code="service_unavailable" if openai else "SERVICE_UNAVAILABLE")
    assert outage.stack.contacted() == 0


def test_readiness_says_no(outage: World) -> None:
    with outage.client("") as client:
        response = client.get("/v1/status/readyz")
    assert response.status_code == 503
    outage.check(response)


def test_liveness_is_envoys_own(outage: World) -> None:
    response = httpx.get(f"{outage.stack.url}/v1/status/healthz", trust_env=False)
    assert response.status_code == 200
    outage.check(response)
