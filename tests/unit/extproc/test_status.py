"""Readiness: what is said of each backend and component, and that nothing behind it can hold it up."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import httpx
import pytest

from extproc.status import CHECK_TIMEOUT_S, BackendStatus, StatusReporter, backend_statuses
from gateway import names
from policies.model import Policy
from tests.unit.policies.policy_builders import a_model, a_policy, a_share

Hosts = list[BackendStatus]


def of_a(hosts: Mapping[str, Hosts] | None, *, killed: Iterable[str] = (), degraded: Iterable[str] = ()) -> str:
    policy = a_policy(a_model(a_share("a"), a_share("b"), degraded=degraded), killed=killed)
    return backend_statuses(policy, hosts)["a"]


@pytest.mark.parametrize(
    ("hosts", "status"),
    [
        (["healthy"], "healthy"),
        (["ejected"], "ejected"),
        (["unhealthy"], "unhealthy"),
        (["ejected", "healthy"], "healthy"),
        (["ejected", "unhealthy"], "unhealthy"),
        ([], "unknown"),
    ],
    ids=str,
)
def test_backend_is_as_well_as_its_best_host(hosts: Hosts, status: str) -> None:
    assert of_a({names.backend_cluster("a"): hosts}) == status


def test_backend_that_envoy_does_not_have_is_unknown() -> None:
    assert of_a({}) == of_a(None) == "unknown"


def test_kill_switch_wins_over_what_envoy_sees() -> None:
    assert of_a({names.backend_cluster("a"): ["healthy"]}, killed=["a"]) == "killed"


@pytest.mark.parametrize(
    ("hosts", "status"), [(["healthy"], "degraded"), (["ejected"], "ejected"), ([], "degraded")], ids=str
)
def test_degraded_is_said_of_what_can_serve(hosts: Hosts, status: str) -> None:
    assert of_a({names.backend_cluster("a"): hosts}, degraded=["a"]) == status


# --- The report.


def host(*, ejected: bool = False, sick: bool = False) -> dict[str, Any]:
    return {"health_status": {"failed_outlier_check": ejected, "failed_active_health_check": sick}}


def clusters(**hosts: dict[str, Any]) -> dict[str, Any]:
    """Clusters of one host each; it is well where nothing is said of it."""
    found = {"a": names.backend_cluster("a"), "extproc": names.CLUSTER_EXTPROC}
    return {
        "cluster_statuses": [
            {"name": name, "host_statuses": [hosts.get(short) or host()]} for short, name in found.items()
        ]
    }


XDS_WELL: dict[str, Any] = {"policy": "d1", "source": "policy_dir", "problems": [], "fleet": {"behind": []}}
LEDGER_WELL: dict[str, Any] = {"status": "ok", "undelivered": 0, "oldest_undelivered_s": 0.0, "warnings": []}


class Behind:
    """What stands behind readiness; an answer of None is an error, and a function may take its time."""

    def __init__(self, *, envoy: Any = None, xds: Any = XDS_WELL, ledger: Any = LEDGER_WELL) -> None:
        self.answers = {"envoy": clusters() if envoy is None else envoy, "xds": xds, "ledger": ledger}
        self.looks = 0

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        self.looks += request.url.host == "envoy"
        answer = self.answers[request.url.host]
        if isinstance(answer, Exception):
            raise answer
        if callable(answer):
            await answer()
        return httpx.Response(200, json=answer)


def a_reporter(
    behind: Behind,
    *,
    policy: Policy | None = None,
    workers: tuple[int, int] = (2, 2),
    ping: Callable[[], Any] | None = None,
) -> StatusReporter:
    return StatusReporter(
        http=httpx.AsyncClient(transport=httpx.MockTransport(behind)),
        ledger=httpx.AsyncClient(transport=httpx.MockTransport(behind)),
        envoy_admin="envoy",
        xds_admin="xds",
        policy=lambda: policy or a_policy(),
        workers=lambda: workers,
        ping_store=ping,
        service="router",
        version="1",
    )


async def hang() -> None:
    await asyncio.Event().wait()


async def fail() -> None:
    raise ConnectionError("redis://:hunter2@10.1.2.3")


REPORTS: dict[str, tuple[dict[str, Any], dict[str, Any], int, str]] = {
    "all is well": ({}, {}, 200, "ready"),
    "xds is away": ({"xds": httpx.ConnectError("no")}, {}, 200, "degraded"),
    "a policy edit was rejected": ({"xds": XDS_WELL | {"problems": ["router.yaml:3: no"]}}, {}, 200, "degraded"),
    "an Envoy is behind": ({"xds": XDS_WELL | {"fleet": {"behind": ["e1"]}}}, {}, 200, "degraded"),
    "a worker is away": ({}, {"workers": (1, 2)}, 200, "degraded"),
    "no worker runs": ({}, {"workers": (0, 2)}, 503, "not_ready"),
    "the ledger is away": ({"ledger": httpx.ConnectError("no")}, {}, 200, "degraded"),
    "records are late": ({"ledger": LEDGER_WELL | {"warnings": ["301 s old"]}}, {}, 200, "degraded"),
    "no worker serves": ({"envoy": clusters(extproc=host(sick=True))}, {}, 503, "not_ready"),
    "envoy is away": ({"envoy": httpx.ConnectError("no")}, {}, 503, "not_ready"),
    "the only backend is ejected": ({"envoy": clusters(a=host(ejected=True))}, {}, 503, "not_ready"),
    "the only backend is sick": ({"envoy": clusters(a=host(sick=True))}, {}, 503, "not_ready"),
    "the only backend is killed": ({}, {"policy": a_policy(killed=["a"])}, 503, "not_ready"),
    "the only backend is degraded": ({}, {"policy": a_policy(a_model(a_share("a"), degraded=["a"]))}, 200, "degraded"),
    "the store is away": ({}, {"ping": fail}, 200, "degraded"),
}


@pytest.mark.parametrize(("behind", "options", "http_status", "status"), REPORTS.values(), ids=REPORTS)
async def test_report_says_how_it_stands(
    *, behind: dict[str, Any], options: dict[str, Any], http_status: int, status: str
) -> None:
    report = await a_reporter(Behind(**behind), **options).report()
    assert (report.http_status, report.body["status"]) == (http_status, status)
    assert "hunter2" not in str(report.body)


async def test_report_counts_backends_and_names_components() -> None:
    policy = a_policy(a_model(a_share("a"), a_share("b"), a_share("c")), killed=["c"])
    body: Any = (await a_reporter(Behind(), policy=policy).report()).body
    assert body["backends"] == {
        "total": 3,
        "ready": 2,
        "degraded": 2,
        "items": [
            {"id": "a", "status": "healthy"},
            {"id": "b", "status": "unknown"},
            {"id": "c", "status": "killed"},
        ],
    }
    assert {name: component["status"] for name, component in body["components"].items()} == {
        "envoy": "up",
        "xds": "up",
        "extproc": "up",
        "usage": "up",
        "store": "not_configured",
    }


async def test_everything_that_hangs_is_down_within_a_second() -> None:
    started_s = time.monotonic()
    report = await a_reporter(Behind(envoy=hang, xds=hang, ledger=hang), ping=hang).report()
    assert time.monotonic() - started_s < CHECK_TIMEOUT_S + 0.4
    components: Any = report.body["components"]
    assert [components[name]["status"] for name in ("envoy", "xds", "usage", "store")] == ["down"] * 4


async def test_many_who_ask_at_once_share_one_look() -> None:
    behind = Behind()
    reporter = a_reporter(behind)
    reports = await asyncio.gather(*(reporter.report() for _ in range(50)))
    assert all(report is reports[0] for report in reports)
    assert behind.looks == 1
