"""What the machine's operator may ask the ledger, on its socket: kept policies, the three counts, sums of records."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gateway.errors import Reason, Refused
from gateway.telemetry import Logger
from usage.accounts import Accounts
from usage.archive import Archive
from usage.audit_app import answering
from usage.events import moment_us
from usage.sums import sum_records

POLICIES_PATH: Final = "/operator/policies"
RECONCILIATION_PATH: Final = "/operator/reconciliation"
SUMS_PATH: Final = "/operator/sums"


def operator_routes(archive: Archive, accounts: Accounts, *, log: Logger) -> list[Route]:
    """Envoy leads to none of these."""

    async def policy(request: Request) -> Response:
        document = await archive.policy(request.path_params["digest"])
        if document is None:
            raise Refused(Reason.PATH_UNKNOWN, "No such policy was kept.")
        return JSONResponse(json.loads(document))

    async def reconciliation(_: Request) -> Response:
        return JSONResponse((await accounts.look()).as_json())

    async def sums(request: Request) -> Response:
        since = request.query_params.get("since")
        try:
            since_us = None if since is None else moment_us(since)
        except (ValueError, OverflowError):
            raise Refused(Reason.INVALID_FIELD, "since is no time.", param="since") from None
        found = await sum_records(archive, since_us=since_us, organization_id=request.query_params.get("organization"))
        return JSONResponse({"sums": [asdict(one) for one in found]})

    return [
        Route(f"{POLICIES_PATH}/{{digest}}", answering(policy, log), methods=["GET"]),
        Route(RECONCILIATION_PATH, answering(reconciliation, log), methods=["GET"]),
        Route(SUMS_PATH, answering(sums, log), methods=["GET"]),
    ]
