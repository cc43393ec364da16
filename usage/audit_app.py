"""HTTP for those who ask what happened: receipts and audit events. Envoy sends what ext_proc has authenticated.

On the same socket, on paths that Envoy does not route, is what only the machine's operator may ask: whoever may open
the socket. Those are in :mod:`usage.operator_app`.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import sqlite3
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Final

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gateway import names
from gateway.endpoints import AUDIT_PATH
from gateway.errors import Reason, Refused, StoreUnavailable, router_body
from gateway.telemetry import Logger
from limits import about as abouts
from limits.model import Opened
from policies.load import PolicyRejected
from policies.model import OrganizationId, Policy
from usage.archive import Archive
from usage.events import check_parameters, list_events, read_asked
from usage.policies import read_policy
from usage.receipt import Kept, receipt_of, refused_receipt, running_receipt
from usage.spool import RECORDS_MARK

ANSWER_WITHIN_S: Final = 4.0
"""Less than Envoy waits, whose own answer cannot say what is amiss."""
ORGANIZATIONS_AT_ONCE: Final = 50
ORGANIZATIONS_MAX: Final = 5000
"""Among which a request that runs is looked for."""
POLICIES_MAX: Final = 8
"""Policies that are kept worked out: receipts are mostly asked for of the newest."""
_HEADERS: Final = dict([names.NO_STORE])
_TRACEPARENT: Final = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")

Answer = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """What is asked: the spool, and the limit store for what still runs (None: nothing is limited)."""

    archive: Archive
    opened: Callable[[OrganizationId, str], Awaitable[Opened | None]] | None
    health: Callable[[], Mapping[str, Any]]
    log: Logger
    organizations: Callable[[], Awaitable[tuple[OrganizationId, ...]]] | None = None
    """Those that have used the limit store; None: each may be asked for its own alone."""


class Receipts:
    """Looks up what is known of a request."""

    def __init__(self, sources: Sources) -> None:
        self._archive = sources.archive
        self._opened = sources.opened
        self._organizations = sources.organizations
        self._log = sources.log
        self._policies: dict[str, Policy] = {}

    async def find(self, request_id: str, organization_id: str, *, everyones: bool) -> dict[str, Any]:
        """The receipt of a request of this organisation or, with ``everyones``, of any.

        Raises:
            Refused: REQUEST_UNKNOWN, also of another organisation's.
            sqlite3.Error: the spool cannot be read.
        """
        of = None if everyones else organization_id
        request = await self._archive.request(request_id, of=of)
        if request is not None:
            return receipt_of(
                Kept(
                    request=request,
                    attempts=await self._archive.attempts(request.request_id),
                    events=await self._archive.events_of(request.request_id, of=of),
                    policy=await self._policy(request.told["policy"]),
                    delivered_to=int(await self._archive.mark(RECORDS_MARK, 0)),
                    refusal=await self._archive.refusal(RECORDS_MARK, request.seq),
                )
            )
        running = await self._running(OrganizationId(organization_id), request_id, everyones=everyones)
        if running is not None:
            return running
        events = await self._archive.events_of(request_id, of=of)
        if not events:
            raise Refused(Reason.REQUEST_UNKNOWN)
        return refused_receipt(request_id, events)

    async def _running(
        self, organization_id: OrganizationId, request_id: str, *, everyones: bool
    ) -> dict[str, Any] | None:
        try:
            opened = await self._open_of((organization_id,) if organization_id else (), request_id)
            if opened is None and everyones and self._organizations is not None:
                others = (each for each in await self._organizations() if each != organization_id)
                opened = await self._open_of(tuple(islice(others, ORGANIZATIONS_MAX)), request_id)
        except StoreUnavailable:
            return None
        if opened is None:
            return None
        return running_receipt(opened, await self._policy(abouts.read(opened.about).policy))

    async def _open_of(self, organizations: Sequence[OrganizationId], request_id: str) -> Opened | None:
        """The open request of one of these organisations."""
        if self._opened is None:
            return None
        for start in range(0, len(organizations), ORGANIZATIONS_AT_ONCE):
            some = organizations[start : start + ORGANIZATIONS_AT_ONCE]
            found = await asyncio.gather(*(self._opened(each, request_id) for each in some))
            opened = next((each for each in found if each is not None), None)
            if opened is not None:
                return opened
        return None

    async def _policy(self, digest: str) -> Policy | None:
        found = self._policies.get(digest)
        if found is not None:
            return found
        document = await self._archive.policy(digest) if digest else None
        if document is None:
            return None
        try:
            # Of a large policy it takes a second that others must not wait for.
            loaded = await asyncio.to_thread(read_policy, document)
        except PolicyRejected as rejected:
            self._log.warning("kept_policy_rejected", digest=digest, problems=len(rejected.problems))
            return None
        while len(self._policies) >= POLICIES_MAX:
            del self._policies[next(iter(self._policies))]
        self._policies[digest] = loaded.policy
        return loaded.policy


def audit_routes(sources: Sources) -> list[Route]:
    """What Envoy may ask for."""
    receipts = Receipts(sources)

    async def receipt(request: Request) -> Response:
        organization_id, is_admin = _asker(request)
        check_parameters(request.query_params.multi_items(), ())
        found = await receipts.find(request.path_params["request_id"], organization_id, everyones=is_admin)
        return JSONResponse(found, headers=_HEADERS)

    async def events(request: Request) -> Response:
        organization_id, is_admin = _asker(request)
        asked = read_asked(request.query_params.multi_items())
        if not is_admin:
            if asked.organization_id not in {None, organization_id}:
                raise Refused(Reason.SCOPE_MISSING, "Only a key with the admin scope sees other organisations.")
            asked = replace(asked, organization_id=organization_id)
        page = await list_events(sources.archive, asked)
        return JSONResponse({"events": page.events, "next_cursor": page.cursor}, headers=_HEADERS)

    return [
        Route(AUDIT_PATH, answering(in_time(events), sources.log), methods=["GET"]),
        Route(f"{AUDIT_PATH}/{{request_id:path}}", answering(in_time(receipt), sources.log), methods=["GET"]),
    ]


def build_audit_app(sources: Sources, operators: list[Route]) -> Starlette:
    """The socket's server; ``operators`` are the routes that Envoy does not lead to."""

    async def healthz(_: Request) -> Response:
        return JSONResponse({"status": "ok", **sources.health()})

    async def unknown(request: Request, _: Exception) -> Response:
        return refusal(Refused(Reason.PATH_UNKNOWN), request)

    routes = [Route("/healthz", healthz), *audit_routes(sources), *operators]
    app = Starlette(routes=routes, exception_handlers={404: unknown, 405: unknown})
    app.router.redirect_slashes = False
    return app


def in_time(answer: Answer) -> Answer:
    """The handler, which refuses with SERVICE_DOWN what takes longer than Envoy waits."""

    async def answered(request: Request) -> Response:
        try:
            async with asyncio.timeout(ANSWER_WITHIN_S):
                return await answer(request)
        except TimeoutError:
            raise Refused(Reason.SERVICE_DOWN, "The ledger takes too long to answer; try again.") from None

    return answered


def answering(answer: Answer, log: Logger) -> Answer:
    """The handler with errors as the contract has them."""

    async def answered(request: Request) -> Response:
        try:
            return await answer(request)
        except Refused as refused:
            return refusal(refused, request)
        except sqlite3.Error as error:
            log.exception("spool_not_readable", error=str(error))
            return refusal(Refused(Reason.SERVICE_DOWN, "The ledger cannot be read at the moment; try again."), request)
        except Exception:  # the last line of defence: our bug, told to nobody but the log
            error_id = secrets.token_hex(8)
            log.exception("audit_failed", error_id=error_id, request_id=request.headers.get(names.HEADER_REQUEST_ID))
            return refusal(Refused(Reason.BUG, f"The router failed; its log has error id {error_id}."), request)

    return answered


def refusal(refused: Refused, request: Request) -> Response:
    """A refusal in the router's own format."""
    said = refused.refusal
    traced = _TRACEPARENT.fullmatch(request.headers.get("traceparent", ""))
    trace_id = traced[1] if traced else request.headers.get(names.HEADER_REQUEST_ID, "")
    body = router_body(code=said.code, text=refused.text, trace_id=trace_id, param=refused.param)
    return Response(body, status_code=said.status, headers=_HEADERS, media_type="application/json")


def _asker(request: Request) -> tuple[str, bool]:
    """For which organisation it is asked, and whether for every other one too.

    Raises:
        Refused: KEY_MISSING: whoever sent this was not authenticated by ext_proc.
    """
    organization_id = request.headers.get(names.HEADER_ORGANIZATION, "")
    is_admin = request.headers.get(names.HEADER_ADMIN) == "true"
    if not organization_id and not is_admin:
        raise Refused(Reason.KEY_MISSING)
    return organization_id, is_admin
