"""The decision on one request, read from top to bottom: authenticate, validate, route.

A :class:`Decision` is the one mutable object of a request. It takes the exchange's events one by one and gives
the command for each; a client's fault ends it with a reply, a fault of ours with a 500 that the log explains.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

from extproc.authenticate import authenticate, presented_key, require_scope, verify_signature
from extproc.exchange import (
    Command,
    Continue,
    Event,
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
from extproc.policy import PolicyTable
from extproc.replies import model_list, refusal
from extproc.route import choose, route
from extproc.translate import Trace, answer
from extproc.validate import Ask, validate
from gateway import names
from gateway.endpoints import MODELS_PATH, POST_ENDPOINTS, Endpoint, Kind
from gateway.errors import Reason, Refused
from gateway.telemetry import Logger

_POSTS: Final[Mapping[str, Endpoint]] = {endpoint.path: endpoint for endpoint in POST_ENDPOINTS}
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
    body_max_bytes: int
    payload_max_bytes: int


class Decision:
    """One request on its way through the pipeline."""

    __slots__ = (
        "_answer_headers",
        "_ask",
        "_caller",
        "_deciders",
        "_endpoint",
        "_head",
        "_phase",
        "_started_s",
        "_trace",
    )

    def __init__(self, deciders: Deciders, traceparent: str | None) -> None:
        self._deciders = deciders
        self._trace = traceparent
        self._phase = Phase.REQUEST_HEADERS
        self._head: Mapping[str, str] = {}
        self._answer_headers: Mapping[str, str] = {}
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
                    return self._on_request_body(event)
                case ResponseHeaders():
                    self._answer_headers = event.headers
                    return self._on_empty_answer() if event.ends else Continue()
                case ResponseBody():
                    return self._on_answer(event.body)
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
        return Continue()

    def _models(self, path: str, caller: Caller) -> Reply:
        table = self._deciders.policy()
        self._deciders.outcomes.decided(_MODELS.kind.value, "answered")
        return model_list(path.removeprefix(MODELS_PATH).strip("/"), caller, table)

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

    def _on_request_body(self, event: RequestBody) -> Command:
        deciders, caller, table = self._deciders, self._caller, self._deciders.policy()
        assert caller is not None  # noqa: S101 - the phases see to it
        ask = validate(
            self._endpoint,
            event.body,
            body_max_bytes=deciders.body_max_bytes,
            payload_max_bytes=deciders.payload_max_bytes,
        )
        self._verify(caller, ask, event.body)
        choice = choose(caller, ask, table.index, table.silent)
        self._ask = ask
        deciders.outcomes.decided(self._endpoint.kind.value, "forwarded")
        return route(caller, ask, choice, self._endpoint)

    def _verify(self, caller: Caller, ask: Ask, body: bytes) -> None:
        over_body = self._head.get(names.HEADER_SIGNATURE)
        if over_body is None and ask.inference is not None:
            verify_signature(caller, ask.inference.signature_hex, ask.inference.payload.encode())
        else:
            verify_signature(caller, over_body, body)

    def _on_empty_answer(self) -> Command:
        """There is no body whose replacement could carry the answer: it has to be a reply of ours."""
        command = self._on_answer(b"")
        if not isinstance(command, Rewrite):
            return command
        return Reply(status=command.status or int(self._answer_headers[":status"]), body=command.body)

    def _on_answer(self, body: bytes) -> Command:
        ask, inference = self._ask, self._ask.inference if self._ask else None
        if ask is None or inference is None:
            return Continue()
        backend = self._answer_headers.get(names.HEADER_ROUTING_BACKEND, "")
        return answer(
            status=int(self._answer_headers.get(":status", "502")),
            body=body,
            request_id=inference.request_id,
            latency_ms=round((self._deciders.clock_s() - self._started_s) * 1000),
            price=self._deciders.policy().prices.get(backend),
            trace=self._ids(),
        )

    def _ids(self) -> Trace:
        """W3C ids of the request's trace, or ids made of the request id where nothing is traced."""
        request_id = self._head.get(names.HEADER_REQUEST_ID, "")
        parts = (self._trace or "").split("-")
        if len(parts) == 4:  # noqa: PLR2004 - version, trace id, parent id, flags
            return Trace(trace_id=parts[1], span_id=parts[2])
        return Trace(trace_id=request_id, span_id=request_id.replace("-", "")[16:])

    def _refuse(self, refused: Refused) -> Reply:
        self._deciders.outcomes.decided(self._endpoint.kind.value, refused.reason.value)
        ids = self._ids()
        self._deciders.log.info(
            "request_refused",
            reason=refused.reason.value,
            status=refused.refusal.status,
            param=refused.param,
            endpoint=self._endpoint.kind.value,
            api_key_id=self._caller.key_id if self._caller else None,
            request_id=self._head.get(names.HEADER_REQUEST_ID),
            trace_id=ids.trace_id,
        )
        return refusal(refused, openai=self._endpoint.openai, trace_id=ids.trace_id)

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
