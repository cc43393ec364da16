"""The decision on one request, read from top to bottom: authenticate, validate, limit, route.

A :class:`Decision` is the one mutable object of a request. It takes the exchange's events one by one and gives
the command for each; a client's fault ends it with a reply, a fault of ours with a 500 that the log explains.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final, NamedTuple, Protocol

from extproc import access_log
from extproc.answering import Answering, Sent
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
    advance,
)
from extproc.keys.record import Caller
from extproc.keys.store import KeyStore
from extproc.limit import Call, Grant, Limiter, claim_of, limit
from extproc.limit_answers import LimitRefused
from extproc.policy import PolicyTable
from extproc.recording import Recording
from extproc.replies import model_list, refusal, repetition
from extproc.route import Choice, choose, route, tells_usage, to_ledger
from extproc.translate import Trace
from extproc.validate import Ask, validate
from gateway import names
from gateway.audit import AuditTrail
from gateway.endpoints import AUDIT_PATH, MODELS_PATH, POST_ENDPOINTS, Endpoint, Kind
from gateway.errors import Reason, Refused, StoreUnavailable
from gateway.telemetry import Logger
from limits.model import Figure, StoredAnswer

_POSTS: Final[Mapping[str, Endpoint]] = {endpoint.path: endpoint for endpoint in POST_ENDPOINTS}
_MODELS: Final = Endpoint(kind=Kind.MODELS, method="GET", path=MODELS_PATH, openai=True)
_AUDIT: Final = Endpoint(kind=Kind.AUDIT, method="GET", path=AUDIT_PATH, openai=False)


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


class Head(NamedTuple):
    """What the headers tell; ``started_s`` is unix seconds."""

    headers: Mapping[str, str]
    endpoint: Endpoint
    started_s: float


_NO_HEAD: Final = Head(headers={}, endpoint=_MODELS, started_s=0.0)


class Decision:
    """One request on its way through the pipeline."""

    __slots__ = ("_answering", "_ask", "_asked", "_caller", "_deciders", "_head", "_phase", "_table", "_traceparent")

    def __init__(self, deciders: Deciders, traceparent: str | None) -> None:
        self._deciders = deciders
        self._table = deciders.policy()
        self._traceparent = traceparent
        self._phase = Phase.REQUEST_HEADERS
        self._head = _NO_HEAD
        self._caller: Caller | None = None
        self._ask: Ask | None = None
        self._asked: Metadata = ()
        self._answering: Answering | None = None

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
                    return await self._answering.on_headers(event) if self._answering else Continue()
                case ResponseBody():
                    return await self._answering.on_body(event) if self._answering else Continue()
        except Refused as refused:
            return self._refuse(refused)
        except Exception:  # noqa: BLE001 - the last line of defence: our bug, told to nobody but the log
            return self._fail()

    async def _on_request_headers(self, event: RequestHeaders) -> Command:
        path = event.headers.get(":path", "").partition("?")[0]
        endpoint = _POSTS.get(path) or (_AUDIT if path.startswith(AUDIT_PATH) else _MODELS)
        head = self._head = Head(event.headers, endpoint, self._deciders.clock_s())
        key = presented_key(event.headers.get(names.HEADER_AUTHORIZATION), event.headers.get(names.HEADER_API_KEY))
        self._caller = await authenticate(key, self._deciders.keys, head.started_s)
        if head.endpoint is _MODELS:
            if not path.startswith(MODELS_PATH):  # CONNECT has no path, and no route of Envoy's turns it away
                raise Refused(Reason.PATH_UNKNOWN)
            require_scope(self._caller, "models")
            return self._models(path, self._caller)
        if head.endpoint is _AUDIT:
            require_scope(self._caller, "audit")
            return self._to_ledger(self._caller)
        require_scope(self._caller, "inference")
        self._check_body_to_come(event)
        self._asked = access_log.asked(self._caller, head.endpoint, self._table.digest)
        return Continue(metadata=self._asked)

    def _replied(self, reply: Reply, reason: str, *, closed: bool, figures: tuple[Figure, ...] = ()) -> Reply:
        """The reply with what the access log is told of it."""
        said = access_log.replied(reason, self._ask, closed=closed)
        limits = (*access_log.of_request(self._ask, self._trace()), *access_log.of_limits(figures))
        asked = self._asked or access_log.asked(self._caller, self._head.endpoint, self._table.digest)
        return replace(reply, metadata=(*asked, *said), limits=limits)

    def _models(self, path: str, caller: Caller) -> Reply:
        reply = model_list(path.removeprefix(MODELS_PATH).strip("/"), caller, self._table)
        self._deciders.outcomes.decided(_MODELS.kind.value, "answered")
        return self._replied(reply, names.REASON_LISTED, closed=True)

    def _to_ledger(self, caller: Caller) -> Command:
        self._deciders.outcomes.decided(_AUDIT.kind.value, "forwarded")
        asked = access_log.asked(caller, _AUDIT, self._table.digest)
        return to_ledger(caller, (*asked, *access_log.replied(names.REASON_LISTED, None, closed=True)))

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
        deciders, caller, table, endpoint = self._deciders, self._caller, self._table, self._head.endpoint
        assert caller is not None  # noqa: S101 - the phases see to it
        ask = validate(
            endpoint,
            event.body,
            body_max_bytes=deciders.body_max_bytes,
            payload_max_bytes=deciders.payload_max_bytes,
        )
        self._ask = ask
        self._verify(caller, ask, event.body)
        choice = choose(caller, ask, table.index, table.silent)
        headers, trace = self._head.headers, self._trace()
        claim = claim_of(endpoint, ask, event.body, headers.get(names.HEADER_IDEMPOTENCY_KEY))
        call = Call(headers.get(names.HEADER_REQUEST_ID, ""), endpoint, claim, trace)
        grant = await limit(deciders.limiter, caller, ask, choice, table, call=call)
        if isinstance(grant, StoredAnswer):
            deciders.outcomes.decided(endpoint.kind.value, "repeated")
            return self._replied(repetition(grant), names.REASON_REPEATED, closed=True)
        deciders.outcomes.decided(endpoint.kind.value, "forwarded")
        forward = route(
            caller,
            ask,
            choice,
            endpoint,
            grant.edits,
            metadata=(*self._asked, *grant.metadata),
            figures=grant.figures + access_log.of_request(ask, trace),
        )
        if ask.inference is not None or grant.claim is not None or not choice.reports_usage:
            without_usage = (names.METADATA_STRIP_USAGE, True) in forward.metadata
            self._answering = self._expected(caller, ask, choice, grant, without_usage=without_usage)
        return forward

    def _expected(self, caller: Caller, ask: Ask, choice: Choice, grant: Grant, *, without_usage: bool) -> Answering:
        """What is to be done with the answer; ``without_usage``: its usage is for the router alone."""
        deciders, table = self._deciders, self._table
        recording = Recording(
            claim=grant.claim,
            store=deciders.limiter.store,
            organization_id=caller.organization_id,
            request_id=self._head.headers.get(names.HEADER_REQUEST_ID, ""),
            max_bytes=deciders.kept_answer_max_bytes,
            kind=ask.kind,
            without_usage=without_usage,
        )
        sent = Sent(
            ask=ask,
            costs=table.costs(caller.organization_id, ask.model, choice.variant),
            silent=table.silent,
            tells_usage=tells_usage(ask, choice),
            tokens_input=grant.tokens_input,
            started_s=self._head.started_s,
            trace=self._ids(),
        )
        return Answering(sent, recording, tokens=deciders.limiter.tokens, clock_s=deciders.clock_s, log=deciders.log)

    def _verify(self, caller: Caller, ask: Ask, body: bytes) -> None:
        over_body = self._head.headers.get(names.HEADER_SIGNATURE)
        if over_body is None and ask.inference is not None:
            verify_signature(caller, ask.inference.signature_hex, ask.inference.payload.encode())
        else:
            verify_signature(caller, over_body, body)

    @property
    def waited_for(self) -> bool:
        """Whether somebody may wait for this answer by its idempotency key."""
        return self._answering is not None and self._answering.waited_for

    async def end(self) -> None:
        """The exchange is over before its answer was complete: the next request with its key is the first again."""
        if self._answering is not None:
            await self._answering.end()

    def _trace(self) -> str:
        """``<trace id>-<span id>``; '' where nothing is traced."""
        parts = (self._traceparent or "").split("-")
        return f"{parts[1]}-{parts[2]}" if len(parts) == 4 else ""  # noqa: PLR2004 - version, trace id, parent id, flags

    def _ids(self) -> Trace:
        """W3C ids of the request's trace, or ids made of the request id where nothing is traced."""
        trace_id, _, span_id = self._trace().partition("-")
        if trace_id:
            return Trace(trace_id=trace_id, span_id=span_id)
        request_id = self._head.headers.get(names.HEADER_REQUEST_ID, "")
        return Trace(trace_id=request_id, span_id=request_id.replace("-", "")[16:])

    def _refuse(self, refused: Refused) -> Reply:
        head, ids, caller = self._head, self._ids(), self._caller
        self._deciders.outcomes.decided(head.endpoint.kind.value, refused.reason.value)
        request_id = head.headers.get(names.HEADER_REQUEST_ID, "")
        said = told(refused, head.endpoint, model=self._ask.model if self._ask else None, trace_id=ids.trace_id)
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
        reply = refusal(refused, openai=head.endpoint.openai, trace_id=ids.trace_id)
        if head.endpoint is _AUDIT:
            reply = replace(reply, headers=(*reply.headers, names.NO_STORE))
        figures = refused.figures if isinstance(refused, LimitRefused) else ()
        return self._replied(reply, refused.refusal.code, closed=outage is None, figures=figures)

    def _fail(self) -> Reply:
        error_id, ids, head = secrets.token_hex(8), self._ids(), self._head
        self._deciders.outcomes.decided(head.endpoint.kind.value, Reason.BUG.value)
        self._deciders.log.exception(
            "request_failed",
            error_id=error_id,
            request_id=head.headers.get(names.HEADER_REQUEST_ID),
            trace_id=ids.trace_id,
        )
        refused = Refused(Reason.BUG, f"The router failed; its log has error id {error_id}.")
        reply = refusal(refused, openai=head.endpoint.openai, trace_id=ids.trace_id)
        # The store may have been asked before: whether an entry is open is for the ledger to find out.
        return self._replied(reply, refused.refusal.code, closed=False)
