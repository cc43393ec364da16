"""HTTP for those who ask what happened: receipts and audit events. Envoy sends what ext_proc has authenticated."""

from __future__ import annotations

from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route


def build_audit_app(ledger: Any) -> Starlette:
    async def healthz(_: Request) -> Response:
        return JSONResponse({"status": "ok", **ledger.health()})

    return Starlette(routes=[Route("/healthz", healthz)])
