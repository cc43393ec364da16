"""The control plane's admin API: what is in force, who runs it, and whether that is well.

It has no authentication and belongs on the loopback interface.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gateway.telemetry import get_logger
from xds.fleet import Fleet, Node
from xds.server import AdsServer
from xds.snapshot import short_name

log = get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyStatus:
    """The policy in force, and what is wrong with the directory now. ``loaded_at`` is RFC 3339."""

    digest: str
    loaded_at: str
    source: Literal["policy_dir", "last_good"]
    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def build_app(
    *,
    version: str,
    server: AdsServer,
    registry: CollectorRegistry,
    policy_status: Callable[[], PolicyStatus | None],
    effective_policy: Callable[[], object],
) -> Starlette:
    """The admin application.

    Args:
        version: of this program.
        policy_status: None before a policy was loaded.
        effective_policy: the policy in force as JSON values, credentials by reference only; None before there is one.
    """

    async def status(_: Request) -> Response:
        return JSONResponse(_status(version=version, server=server, policy=policy_status()))

    async def metrics(_: Request) -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    async def healthz(_: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def readyz(_: Request) -> Response:
        if server.snapshot is None:
            return _error(503, "No policy has been published yet.", "SERVICE_UNAVAILABLE")
        return JSONResponse({"status": "ready", "snapshot": server.snapshot.version})

    async def policy(_: Request) -> Response:
        effective = effective_policy()
        if effective is None:
            return _error(503, "No policy has been loaded yet.", "SERVICE_UNAVAILABLE")
        return JSONResponse(effective)

    return Starlette(
        routes=[
            Route("/status", status),
            Route("/metrics", metrics),
            Route("/healthz", healthz),
            Route("/readyz", readyz),
            Route("/policy", policy),
        ],
        exception_handlers={HTTPException: _http_error, Exception: _bug},
    )


def _status(*, version: str, server: AdsServer, policy: PolicyStatus | None) -> dict[str, object]:
    return {
        "version": version,
        "snapshot": server.snapshot.version if server.snapshot else None,
        "policy": policy.digest if policy else None,
        "loaded_at": policy.loaded_at if policy else None,
        "source": policy.source if policy else None,
        "problems": list(policy.problems) if policy else [],
        "warnings": list(policy.warnings) if policy else [],
        **_fleet(server.fleet, server.snapshot.version if server.snapshot else ""),
    }


def _fleet(fleet: Fleet, snapshot_version: str) -> dict[str, object]:
    summary = fleet.summary(snapshot_version)
    return {
        "fleet": {
            "converged": summary.converged,
            "connected": summary.connected,
            "behind": [
                {
                    "id": node.id,
                    "lagging": [short_name(type_url) for type_url in node.lagging],
                    "rejected": [short_name(type_url) for type_url in node.rejected],
                }
                for node in summary.behind
            ],
        },
        "nodes": [_node(node) for node in fleet.nodes],
    }


def _node(node: Node) -> dict[str, object]:
    return {
        "id": node.id,
        "address": node.address,
        "protocol": node.protocol,
        "connected": node.connected,
        "since": node.since_s,
        "snapshot": node.snapshot_version or None,
        "converged": node.converged,
        "types": {
            short_name(each.type_url): {
                "sent": each.sent_version or None,
                "acked": each.acked_version or None,
                "rejected": each.rejected_version or None,
                "message": each.message or None,
                "changed": each.changed_at_s,
            }
            for each in node.types
        },
    }


async def _http_error(_: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    text, code = {
        404: ("There is nothing at this path.", "NOT_FOUND"),
        405: ("This path takes GET only.", "METHOD_NOT_ALLOWED"),
    }.get(status, ("The request cannot be served.", "INVALID_REQUEST"))
    return _error(status, text, code)


async def _bug(_: Request, error: Exception) -> Response:
    log.error("admin_failed", exc_info=error)
    return _error(500, "The control plane failed; its log says why.", "INTERNAL_ERROR")


def _error(status: int, text: str, code: str) -> Response:
    return JSONResponse({"error": text, "code": code}, status_code=status)
