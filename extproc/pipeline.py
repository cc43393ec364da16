"""The decision on one request, read from top to bottom: authenticate, validate, limit, route.

A :class:`Decision` is the one mutable object of a request. It takes the exchange's events one by one and gives
the command for each; a client's fault ends it with a reply, a fault of ours with a 500 that the log explains.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final, Protocol

from extproc.audit import AUDITED, denial, told
from extproc.authenticate import authenticate, presented_key, require_scope, verify_signature
from extproc.exchange import (
    Command,
    Continue,
    Event,
    Metadata,
    Phase,
    Reply,
    RequestBody,
    RequestHeaders,
    ResponseBody,
    ResponseHeaders,
    Rewrite,
    advance,
)
from extproc.keys.record import Caller
from extproc.keys.store import KeyStore
from extproc.limit import Limiter, claim_of, limit
from extproc.policy import PolicyTable
from extproc.recording import Recording
from extproc.replies import model_list, refusal, repetition
from extproc.route import choose, route
from extproc.translate import Trace, answer
from extproc.validate import Ask, Inference, validate
from gateway import names
from gateway.audit import AuditTrail
from gateway.endpoints import MODELS_PATH, POST_ENDPOINTS, Endpoint, Kind
from gateway.errors import Reason, Refused, StoreUnavailable
from gateway.telemetry import Logger
from limits.model import StoredAnswer

_POSTS: Final[Mapping[str, Endpoint]] = {endpoint.path: endpoint for endpoint in POST_ENDPOINTS}
_CLOSED: Final = (names.METADATA_CLOSED, True)
_MODELS: Final = Endpoint(kind=Kind.MODELS, method="GET", path=MODELS_PATH, openai=True)


class Outcomes(Protocol):
    """Counts what became of requests."""

    def decided(self, endpoint: str, outcome: str) -> None:
        """One request was forwarded, answered or refused for ``outcome``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Deciders:
    """What decisions are made with; the same for every request of a worker. ``clock_s`` is unix time."""

    keys: KeyStore
    policy: Callable[[], PolicyTable]
    outcomes: Outcomes
    log: Logger
    clock_s: Callable[[], float]
    limiter: Limiter
    audit: AuditTrail
    body_max_bytes: int
    payload_max_bytes: int
    kept_answer_max_bytes: int


class Decision:
    """One request on its way through the pipeline."""

    __slots__ = (
        "_ask",
        "_caller",
        "_deciders",
        "_endpoint",
        "_head",
        "_phase",
        "_recording",
        "_started_s",
        "_trace",
    )

    def __init__(self, deciders: Deciders, traceparent: str | None) -> None:
        self._deciders = deciders
        self._trace = traceparent
        self._phase = Phase.REQUEST_HEADERS
        self._head: Mapping[str, str] = {}
        self._recording: Recording | None = None
        self._endpoint = _MODELS
        self._caller: Caller | None = None
        self._ask: Ask | None = None
        self._started_s = 0.0

    async def on_event(self, event: Event) -> Command:
        """The command for an event. Never raises but for events out of phase and cancellation."""
        self._phase = advance(self._phase, event)
        try:
            match event:
                case RequestHeaders():
                    return await self._on_request_headers(event)
                case RequestBody():
                    return await self._on_request_body(event)
                case ResponseHeaders():
                    return await self._on_response_headers(event)
                case ResponseBody():
                    return await self._on_response_body(event)
        except Refused as refused:
            return self._refuse(refused)
        except Exception:  # noqa: BLE001 - the last line of defence: our bug, told to nobody but the log
            return self._fail()

    async def _on_request_headers(self, event: RequestHeaders) -> Command:
        self._head, self._started_s = event.headers, self._deciders.clock_s()
        path = event.headers.get(":path", "").partition("?")[0]
        self._endpoint = _POSTS.get(path, _MODELS)
        key = presented_key(event.headers.get(names.HEADER_AUTHORIZATION), event.headers.get(names.HEADER_API_KEY))
        self._caller = await authenticate(key, self._deciders.keys, self._started_s)
        if self._endpoint is _MODELS:
            if not path.startswith(MODELS_PATH):  # CONNECT has no path, and no route of Envoy's turns it away
                raise Refused(Reason.PATH_UNKNOWN)
            require_scope(self._caller, "models")
            return self._models(path, self._caller)
        require_scope(self._caller, "inference")
        self._check_body_to_come(event)
        return Continue(metadata=self._whose())

    def _whose(self) -> Metadata:
        """Who is calling, for the access log."""
        caller = self._caller
        if caller is None:
            return ()
        return ((names.METADATA_ORGANIZATION, caller.organization_id), (names.METADATA_KEY, caller.key_id))

    def _models(self, path: str, caller: Caller) -> Reply:
        table = self._deciders.policy()
        reply = model_list(path.removeprefix(MODELS_PATH).strip("/"), caller, table)
        self._deciders.outcomes.decided(_MODELS.kind.value, "answered")
        return replace(reply, metadata=(*self._whose(), _CLOSED))

    def _check_body_to_come(self, event: RequestHeaders) -> None:
        """Refuse by the headers what would be refused by the body, before it is buffered."""
        media_type, _, parameter = event.headers.get("content-type", "").partition(";")
        charset = parameter.strip().lower()
        if media_type.strip().lower() != "application/json" or charset not in ("", "charset=utf-8", 'charset="utf-8"'):
            raise Refused(Reason.MEDIA_TYPE)
        if event.headers.get("content-encoding", "identity") != "identity":
            raise Refused(Reason.MEDIA_TYPE, "Send the body without a Content-Encoding.")
        length = event.headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._deciders.body_max_bytes:
            raise Refused(
                Reason.BODY_TOO_LARGE, f"The request body has more than {self._deciders.body_max_bytes} bytes."
            )
        if event.ends:
            raise Refused(Reason.MALFORMED_BODY, "The body is empty; send a JSON object.")

    async def _on_request_body(self, event: RequestBody) -> Command:
        deciders, caller, table = self._deciders, self._caller, self._deciders.policy()
        assert caller is not None  # noqa: S101 - the phases see to it
        ask = validate(
            self._endpoint,
            event.body,
            body_max_bytes=deciders.body_max_bytes,
            payload_max_bytes=deciders.payload_max_bytes,
        )
        self._ask = ask
        self._verify(caller, ask, event.body)
        choice = choose(caller, ask, table.index, table.silent)
        claim = claim_of(self._endpoint, ask, event.body, self._head.get(names.HEADER_IDEMPOTENCY_KEY))
        request_id = self._head.get(names.HEADER_REQUEST_ID, "")
        grant = await limit(deciders.limiter, caller, ask, choice, table, request_id=request_id, claim=claim)
        if isinstance(grant, StoredAnswer):
            deciders.outcomes.decided(self._endpoint.kind.value, "repeated")
            return replace(repetition(grant), metadata=(*self._whose(), _CLOSED))
        deciders.outcomes.decided(self._endpoint.kind.value, "forwarded")
        forward = route(
            caller, ask, choice, self._endpoint, grant.edits, metadata=grant.metadata, figures=grant.figures
        )
        if ask.inference is not None or grant.claim is not None:
            self._recording = Recording(
                claim=grant.claim,
                store=deciders.limiter.store,
                organization_id=caller.organization_id,
                request_id=request_id,
                max_bytes=deciders.kept_answer_max_bytes,
                kind=ask.kind,
                without_usage=(names.METADATA_STRIP_USAGE, True) in forward.metadata,
            )
        return forward

    def _verify(self, caller: Caller, ask: Ask, body: bytes) -> None:
        over_body = self._head.get(names.HEADER_SIGNATURE)
        if over_body is None and ask.inference is not None:
            verify_signature(caller, ask.inference.signature_hex, ask.inference.payload.encode())
        else:
            verify_signature(caller, over_body, body)

    async def _on_response_headers(self, event: ResponseHeaders) -> Command:
        if self._recording is None:
            return Continue()
        self._recording.headers = event.headers
        if not event.ends:
            return Continue()
        command = await self._on_response_body(ResponseBody(body=b""))
        if not isinstance(command, Rewrite):
            return command
        # There is no body whose replacement could carry the answer: it has to be a reply of ours.
        return Reply(status=command.status or self._status(), body=command.body)

    async def _on_response_body(self, event: ResponseBody) -> Command:
        recording, ask = self._recording, self._ask
        if recording is None or ask is None:
            return Continue()
        command: Command = Continue()
        body, status = event.body, self._status()
        if ask.inference is not None:
            command = self._answer(ask.inference, body, recording.headers)
            body, status = command.body, command.status or status
        recording.add(body)
        if event.ends:
            await recording.keep(status=status, log=self._deciders.log)
        return command

    def _status(self) -> int:
        headers = self._recording.headers if self._recording else {}
        return int(headers.get(":status", "502"))

    def _answer(self, inference: Inference, body: bytes, headers: Mapping[str, str]) -> Rewrite:
        backend = headers.get(names.HEADER_ROUTING_BACKEND, "")
        return answer(
            status=self._status(),
            body=body,
            request_id=inference.request_id,
            latency_ms=round((self._deciders.clock_s() - self._started_s) * 1000),
            price=self._deciders.policy().prices.get(backend),
            trace=self._ids(),
        )

    @property
    def waited_for(self) -> bool:
        """Whether somebody may wait for this answer by its idempotency key."""
        return self._recording is not None and self._recording.holds_claim

    async def end(self) -> None:
        """The exchange is over before its answer was complete: the next request with its key is the first again."""
        if self._recording is not None:
            await self._recording.let_go(self._deciders.log)

    def _ids(self) -> Trace:
        """W3C ids of the request's trace, or ids made of the request id where nothing is traced."""
        request_id = self._head.get(names.HEADER_REQUEST_ID, "")
        parts = (self._trace or "").split("-")
        if len(parts) == 4:  # noqa: PLR2004 - version, trace id, parent id, flags
            return Trace(trace_id=parts[1], span_id=parts[2])
        return Trace(trace_id=request_id, span_id=request_id.replace("-", "")[16:])

    def _refuse(self, refused: Refused) -> Reply:
        self._deciders.outcomes.decided(self._endpoint.kind.value, refused.reason.value)
        ids, caller = self._ids(), self._caller
        request_id = self._head.get(names.HEADER_REQUEST_ID, "")
        said = told(refused, self._endpoint, model=self._ask.model if self._ask else None, trace_id=ids.trace_id)
        # Where the store did not answer, an entry may be open all the same, and the ledger has to see to it.
        outage = refused.__cause__ if isinstance(refused.__cause__, StoreUnavailable) else None
        self._deciders.log.info(
            "request_refused",
            api_key_id=caller.key_id if caller else None,
            request_id=request_id,
            cause=str(outage) if outage else None,
            **said,
        )
        if refused.refusal.status in AUDITED:
            event = denial(caller, said, request_id=request_id, now_s=self._deciders.clock_s())
            self._deciders.audit.record(event)
        reply = refusal(refused, openai=self._endpoint.openai, trace_id=ids.trace_id)
        return replace(reply, metadata=self._whose() if outage else (*self._whose(), _CLOSED))

    def _fail(self) -> Reply:
        error_id, ids = secrets.token_hex(8), self._ids()
        self._deciders.outcomes.decided(self._endpoint.kind.value, Reason.BUG.value)
        self._deciders.log.exception(
            "request_failed",
            error_id=error_id,
            request_id=self._head.get(names.HEADER_REQUEST_ID),
            trace_id=ids.trace_id,
        )
        refused = Refused(Reason.BUG, f"The router failed; its log has error id {error_id}.")
        return refusal(refused, openai=self._endpoint.openai, trace_id=ids.trace_id)
