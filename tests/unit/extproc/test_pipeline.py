"""Decisions as dialogues: what Envoy says, and what it is told to do."""

from __future__ import annotations

import hmac
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from extproc.answering import Answering
from extproc.exchange import (
    Command,
    Continue,
    Event,
    Forward,
    OutOfPhase,
    Pass,
    Reply,
    RequestBody,
    RequestHeaders,
    ResponseBody,
    ResponseHeaders,
    Rewrite,
)
from extproc.keys.record import KeyRecord, PresentedKey
from extproc.keys.store import ASK, Ask
from extproc.limit import Limiter
from extproc.pipeline import Deciders, Decision
from extproc.policy import PolicyTable
from gateway import names
from gateway.audit import AuditEvent
from gateway.endpoints import AUDIT_PATH, CHAT_PATH, COMPLETION_PATH, INFERENCE_PATH, MODELS_PATH
from gateway.errors import REFUSALS, Reason, StoreUnavailable
from limits.model import Admission, Admitted, Claimed, Demand, Denied, Figure, LimitKind, StoredAnswer
from policies.limits import CallerLimits
from policies.model import Budget, LimitPolicy, Limits, Policy, Price
from tests.unit.extproc.extproc_builders import REQUEST_ID, a_limiter, a_record, a_table
from tests.unit.policies.policy_builders import a_model, a_policy, a_share

KEY = "rk-alice"
NOW = 1_700_000_000.0
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
INFERENCE = {"request_id": REQUEST_ID, "model": "m", "payload": "hi"}
POLICY = "d" * 64
LET_IN = Continue(
    metadata=(
        (names.METADATA_ORGANIZATION, "acme"),
        (names.METADATA_KEY, "alice"),
        (names.METADATA_ENDPOINT, "chat"),
        (names.METADATA_POLICY, POLICY),
    )
)
CLOSED = (names.METADATA_CLOSED, True)
SECRET_DETAIL = "the store said: password=hunter2"


class FakeKeys:
    """A store with one record; it may have to be asked, be down or be broken."""

    name = "fake"

    def __init__(self, record: KeyRecord | None, *, ask: bool = False, error: Exception | None = None) -> None:
        self._record = record
        self._ask = ask or error is not None
        self._error = error

    def peek(self, key: PresentedKey) -> KeyRecord | Ask | None:
        return ASK if self._ask else self._of(key)

    async def find(self, key: PresentedKey) -> KeyRecord | None:
        if self._error is not None:
            raise self._error
        return self._of(key)

    def _of(self, key: PresentedKey) -> KeyRecord | None:
        return self._record if self._record and self._record.digest == key.digest else None


class FakeLog:
    """Keeps events."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str, dict[str, Any]]] = []

    def info(self, event: str, **fields: Any) -> None:
        self.events.append(("info", event, fields))

    def exception(self, event: str, **fields: Any) -> None:
        self.events.append(("exception", event, fields))

    def warning(self, event: str, **fields: Any) -> None:
        self.events.append(("warning", event, fields))


class FakeTrail:
    """Keeps audit events."""

    def __init__(self) -> None:
        self.events: list[AuditEvent] = []

    def record(self, event: AuditEvent) -> None:
        self.events.append(event)


class Outcomes:
    """Counts outcomes."""

    def __init__(self) -> None:
        self.counted: Counter[tuple[str, str]] = Counter()

    def decided(self, endpoint: str, outcome: str) -> None:
        self.counted[endpoint, outcome] += 1


class Dialogue:
    """One request and who decides on it."""

    def __init__(
        self,
        *,
        keys: FakeKeys | None = None,
        record: dict[str, Any] | None = None,
        table: PolicyTable | None = None,
        traceparent: str | None = None,
        body_max_bytes: int = 10_000,
        limiter: Limiter | None = None,
        silent: tuple[str, ...] = (),
    ) -> None:
        self.log, self.outcomes, self.now_s, self.trail = FakeLog(), Outcomes(), NOW, FakeTrail()
        policy = a_policy(a_model(a_share("a"), model="m"), a_model(a_share("dead"), model="killed"), killed=["dead"])
        price = Price(input_micro_usd_per_1k=5000, output_micro_usd_per_1k=15_000)
        self._table = table or replace(a_table(policy, prices={"a": price}, silent=silent), digest=POLICY)
        log: Any = self.log
        self._decision = Decision(
            Deciders(
                keys=keys or FakeKeys(a_record(KEY, **(record or {}))),
                policy=lambda: self._table,
                outcomes=self.outcomes,
                log=log,
                clock_s=lambda: self.now_s,
                limiter=limiter or a_limiter(),
                audit=self.trail,
                body_max_bytes=body_max_bytes,
                payload_max_bytes=1000,
                kept_answer_max_bytes=100,
            ),
            traceparent,
        )

    def policy_changes(self, policy: Policy) -> None:
        """From now on another one is in force."""
        self._table = a_table(policy)

    async def say(self, event: Event) -> Command:
        return await self._decision.on_event(event)

    async def headers(self, path: str = CHAT_PATH, *, ends: bool = False, **changes: str | None) -> Command:
        """Envoy tells of request headers; a change to None leaves a header out."""
        said: dict[str, str | None] = {
            ":path": path,
            ":method": "POST",
            "authorization": f"Bearer {KEY}",
            "content-type": "application/json",
            "x-request-id": REQUEST_ID,
        }
        said |= {name.replace("_", "-"): value for name, value in changes.items()}
        return await self.say(RequestHeaders(headers={n: v for n, v in said.items() if v is not None}, ends=ends))

    async def body(self, members: Any) -> Command:
        return await self.say(RequestBody(body=members if isinstance(members, bytes) else json.dumps(members).encode()))

    async def answer(self, body: bytes, *, status: int = 200) -> Command:
        headers = {":status": str(status), names.HEADER_ROUTING_BACKEND: "a"}
        assert await self.say(ResponseHeaders(headers=headers, ends=False)) == Continue()
        return await self.say(ResponseBody(body=body))


def refused(command: Command) -> tuple[int, str]:
    """Status of a reply and its code in either format."""
    assert isinstance(command, Reply)
    body = json.loads(command.body)
    return command.status, body["code"] if "code" in body else body["error"]["code"]


# --- The narrow path.


async def test_chat_is_let_in_and_forwarded_as_it_came() -> None:
    talk = Dialogue()
    assert await talk.headers() == LET_IN
    command = await talk.body(CHAT)
    assert isinstance(command, Forward)
    assert command.body is None
    assert dict(command.headers)[names.HEADER_ORGANIZATION] == "acme"
    assert command.metadata[: len(LET_IN.metadata)] == LET_IN.metadata
    assert (names.METADATA_MODEL, "m") in command.metadata
    assert talk.outcomes.counted == {("chat", "forwarded"): 1}
    assert talk.log.events == []


async def test_answer_of_an_openai_endpoint_is_left_alone() -> None:
    talk = Dialogue()
    await talk.headers()
    await talk.body(CHAT)
    assert await talk.answer(b"anything") == Continue()


async def test_inference_is_translated_both_ways() -> None:
    talk = Dialogue(traceparent=TRACEPARENT)
    await talk.headers(INFERENCE_PATH)
    command = await talk.body(INFERENCE)
    assert isinstance(command, Forward)
    assert dict(command.headers)[":path"] == COMPLETION_PATH
    assert json.loads(command.body or b"") == {"model": "m", "prompt": "hi"}
    talk.now_s += 0.25
    rewritten = await talk.answer(b'{"usage": {"prompt_tokens": 1000, "completion_tokens": 1000}}')
    assert isinstance(rewritten, Rewrite)
    answer = json.loads(rewritten.body)
    assert answer["request_id"] == REQUEST_ID
    assert (answer["usage"]["latency_ms"], answer["usage"]["cost_usd"]) == (250, 0.02)
    assert (answer["trace_id"], answer["span_id"]) == tuple(TRACEPARENT.split("-")[1:3])


async def test_untraced_inference_is_named_by_its_request_id() -> None:
    talk = Dialogue()
    await talk.headers(INFERENCE_PATH)
    await talk.body(INFERENCE)
    rewritten = await talk.answer(b"{}")
    assert isinstance(rewritten, Rewrite)
    answer = json.loads(rewritten.body)
    assert answer["trace_id"] == REQUEST_ID
    assert answer["span_id"] == REQUEST_ID.replace("-", "")[16:]


@pytest.mark.parametrize(("status", "told"), [(204, 502), (302, 502), (200, 502), (400, 400), (503, 502)])
async def test_inference_answered_without_a_body_gets_one_in_a_reply(status: int, told: int) -> None:
    talk = Dialogue()
    await talk.headers(INFERENCE_PATH)
    await talk.body(INFERENCE)
    command = await talk.say(ResponseHeaders(headers={":status": str(status)}, ends=True))
    assert isinstance(command, Reply)
    assert command.status == told
    assert set(json.loads(command.body)) == {"error", "code", "trace_id"}


async def test_openai_answer_without_a_body_is_left_alone() -> None:
    talk = Dialogue()
    await talk.headers()
    await talk.body(CHAT)
    assert await talk.say(ResponseHeaders(headers={":status": "204"}, ends=True)) == Continue()


async def test_store_is_asked_where_it_has_to_be() -> None:
    assert await Dialogue(keys=FakeKeys(a_record(KEY), ask=True)).headers() == LET_IN


# --- Models.


@pytest.mark.parametrize("path", [MODELS_PATH, f"{MODELS_PATH}/", f"{MODELS_PATH}?after=x"])
async def test_models_are_answered_at_once(path: str) -> None:
    talk = Dialogue()
    command = await talk.headers(path, content_type=None, ends=True)
    assert isinstance(command, Reply)
    assert [model["id"] for model in json.loads(command.body)["data"]] == ["killed", "m"]
    assert talk.outcomes.counted == {("models", "answered"): 1}
    assert command.metadata[-2:] == ((names.METADATA_REASON, names.REASON_LISTED), CLOSED)
    assert (names.METADATA_ENDPOINT, "models") in command.metadata


@pytest.mark.parametrize("path", [AUDIT_PATH, f"{AUDIT_PATH}?limit=1", f"{AUDIT_PATH}/{REQUEST_ID}"])
@pytest.mark.parametrize(
    ("scopes", "headers"),
    [
        ((), {names.HEADER_ORGANIZATION: "acme"}),
        (("audit",), {names.HEADER_ORGANIZATION: "acme"}),
        (("inference", "*"), {names.HEADER_ORGANIZATION: "acme"}),
        (("admin",), {names.HEADER_ORGANIZATION: "acme", names.HEADER_ADMIN: "true"}),
    ],
    ids=["any key", "audit", "everything within", "admin"],
)
async def test_ledger_is_asked_for_the_organisation_or_with_the_admin_scope_for_all(
    path: str, scopes: tuple[str, ...], headers: dict[str, str]
) -> None:
    talk = Dialogue(record={"scopes": frozenset(scopes)})
    command = await talk.headers(path, content_type=None, ends=True)
    assert isinstance(command, Pass)
    assert dict(command.headers) == headers
    assert command.metadata[-2:] == ((names.METADATA_REASON, names.REASON_LISTED), CLOSED)
    assert (names.METADATA_ENDPOINT, "audit") in command.metadata
    assert talk.outcomes.counted == {("audit", "forwarded"): 1}


async def test_ledger_is_not_asked_without_a_key_or_its_scope() -> None:
    assert refused(await Dialogue().headers(AUDIT_PATH, authorization=None, ends=True)) == (401, "AUTH_INVALID")
    narrow = Dialogue(record={"scopes": frozenset({"models"})})
    assert refused(await narrow.headers(AUDIT_PATH, ends=True)) == (403, "FORBIDDEN")


async def test_model_is_found_by_its_escaped_name() -> None:
    command = await Dialogue().headers(f"{MODELS_PATH}/%6D", ends=True)
    assert isinstance(command, Reply)
    assert json.loads(command.body)["id"] == "m"


async def test_key_sees_only_its_own_models() -> None:
    command = await Dialogue(record={"allowed_models": frozenset({"m"})}).headers(MODELS_PATH, ends=True)
    assert isinstance(command, Reply)
    assert [model["id"] for model in json.loads(command.body)["data"]] == ["m"]


@pytest.mark.parametrize("path", ["", "/", "/v1/nothing"])
async def test_path_of_no_endpoint_is_answered_with_404(path: str) -> None:
    assert refused(await Dialogue().headers(path, ends=True)) == (404, "not_found")


# --- Refusals.


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"authorization": None}, Reason.KEY_MISSING),
        ({"authorization": "Basic x"}, Reason.KEY_MISSING),
        ({"authorization": "Bearer rk-other"}, Reason.KEY_UNKNOWN),
        ({"x_api_key": "rk-other"}, Reason.CONFLICTING_KEYS),
        ({"content_type": None}, Reason.MEDIA_TYPE),
        ({"content_type": "text/plain"}, Reason.MEDIA_TYPE),
        ({"content_type": "application/jsonp"}, Reason.MEDIA_TYPE),
        ({"content_type": "application/json; charset=latin-1"}, Reason.MEDIA_TYPE),
        ({"content_encoding": "gzip"}, Reason.MEDIA_TYPE),
        ({"content_length": "10001"}, Reason.BODY_TOO_LARGE),
        ({"content_length": "9" * 50}, Reason.BODY_TOO_LARGE),
    ],
    ids=str,
)
@pytest.mark.parametrize("path", [CHAT_PATH, INFERENCE_PATH])
async def test_headers_alone_are_enough_to_refuse(path: str, changes: dict[str, Any], reason: Reason) -> None:
    talk = Dialogue()
    refusal = REFUSALS[reason]
    code = refusal.code if path == INFERENCE_PATH else refusal.openai_code
    assert refused(await talk.headers(path, **changes)) == (refusal.status, code)
    [(level, event, fields)] = talk.log.events
    assert (level, event, fields["reason"], fields["request_id"]) == (
        "info",
        "request_refused",
        reason.value,
        REQUEST_ID,
    )
    assert sum(talk.outcomes.counted.values()) == 1


@pytest.mark.parametrize(
    "content_type", ["application/json", "Application/JSON; charset=UTF-8", 'application/json;charset="utf-8"']
)
async def test_json_in_any_spelling_is_taken(content_type: str) -> None:
    assert await Dialogue().headers(content_type=content_type, content_encoding="identity") == LET_IN


async def test_request_without_a_body_is_refused() -> None:
    assert refused(await Dialogue().headers(ends=True)) == (400, "invalid_request")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"status": "revoked"}, Reason.KEY_REVOKED),
        ({"expires_at": NOW}, Reason.KEY_EXPIRED),
        ({"scopes": frozenset({"audit"})}, Reason.SCOPE_MISSING),
    ],
    ids=["revoked", "expired", "scope"],
)
async def test_record_decides_before_the_body(record: dict[str, Any], reason: Reason) -> None:
    command = await Dialogue(record=record).headers()
    assert refused(command) == (REFUSALS[reason].status, REFUSALS[reason].openai_code)


async def test_401_tells_the_scheme() -> None:
    command = await Dialogue().headers(authorization=None)
    assert isinstance(command, Reply)
    assert ("www-authenticate", "Bearer") in command.headers


async def test_store_that_is_down_is_503_not_401() -> None:
    talk = Dialogue(keys=FakeKeys(None, error=StoreUnavailable(SECRET_DETAIL)))
    command = await talk.headers()
    assert refused(command) == (503, "service_unavailable")
    assert isinstance(command, Reply)
    assert "hunter2" not in command.body.decode()


@pytest.mark.parametrize(
    ("members", "refusal"),
    [
        (b"{", (400, "invalid_request")),
        ({}, (400, "missing_field")),
        (CHAT | {"messages": 1}, (400, "validation_error")),
        (CHAT | {"model": "nope"}, (404, "model_not_found")),
        (CHAT | {"model": "killed"}, (503, "no_backend_available")),
        (b" " * 10_001, (413, "payload_too_large")),
    ],
    ids=["JSON", "missing", "invalid", "model", "killed", "size"],
)
async def test_body_is_refused_in_the_endpoints_format(members: Any, refusal: tuple[int, str]) -> None:
    talk = Dialogue()
    await talk.headers()
    assert refused(await talk.body(members)) == refusal
    assert talk.log.events[0][2]["api_key_id"] == "alice"


async def test_refusal_names_the_field() -> None:
    talk = Dialogue()
    await talk.headers(INFERENCE_PATH)
    command = await talk.body(INFERENCE | {"metadata": {"team": 1}})
    assert isinstance(command, Reply)
    assert json.loads(command.body)["param"] == "metadata.team"


# --- Signatures.

SIGNED = {"signing_secret": "s" * 16, "require_signature": True}


def signature(message: bytes) -> str:
    return hmac.new(b"s" * 16, message, "sha256").hexdigest()


async def test_signature_covers_the_raw_body() -> None:
    talk = Dialogue(record=SIGNED)
    body = json.dumps(CHAT).encode() + b"  "
    await talk.headers(x_hmac_signature=signature(body))
    assert isinstance(await talk.body(body), Forward)


async def test_signature_in_the_body_covers_the_payload() -> None:
    talk = Dialogue(record=SIGNED)
    await talk.headers(INFERENCE_PATH)
    assert isinstance(await talk.body(INFERENCE | {"hmac_signature": signature(b"hi")}), Forward)


@pytest.mark.parametrize("sent", [None, "ab" * 32], ids=["missing", "wrong"])
async def test_missing_or_wrong_signature_is_refused(sent: str | None) -> None:
    talk = Dialogue(record=SIGNED)
    await talk.headers(x_hmac_signature=sent)
    assert refused(await talk.body(CHAT)) == (401, "invalid_api_key")


async def test_unsound_body_is_told_before_its_signature() -> None:
    talk = Dialogue(record=SIGNED)
    await talk.headers()
    assert refused(await talk.body(b"{")) == (400, "invalid_request")


# --- Limits and idempotency keys.


class FakeStore:
    """Admits, or answers as it is told; remembers what was kept."""

    def __init__(self, answer: Admission | StoreUnavailable | None = None) -> None:
        self.answer = answer or Admitted(at_ms=0, tokens_output=4096, micro_usd=1, figures=())
        self.kept: list[tuple[str, StoredAnswer | str | None]] = []

    async def admit(self, demand: Demand, limits: CallerLimits) -> Admission:
        if isinstance(self.answer, StoreUnavailable):
            raise self.answer
        return self.answer

    async def finish(self, organization: str, request: str, claim: str, answer: StoredAnswer | str | None) -> bool:
        self.kept.append((request, answer))
        return True


def limited(store: FakeStore, **said: Any) -> Dialogue:
    any_store: Any = store
    return Dialogue(limiter=a_limiter(any_store), **said)


async def answered(talk: Dialogue, *parts: bytes, status: int = 200, content_type: str = "application/json") -> Command:
    """The answer comes in parts, the last one empty."""
    headers = {":status": str(status), "content-type": content_type, names.HEADER_ROUTING_BACKEND: "a"}
    assert await talk.say(ResponseHeaders(headers=headers, ends=False)) == Continue()
    for part in parts:
        assert await talk.say(ResponseBody(body=part, ends=False)) == Continue()
    return await talk.say(ResponseBody(body=b""))


async def test_refusal_by_a_limit_is_answered_logged_and_audited_with_its_figures() -> None:
    figure = Figure(LimitKind.REQUESTS, "org", 10, 0, 100)
    talk = limited(FakeStore(Denied(at_ms=0, wait_ms=1200, denier=figure, figures=(figure,))))
    await talk.headers()
    command = await talk.body(CHAT)
    assert refused(command) == (429, "rate_limit_exceeded")
    assert isinstance(command, Reply)
    headers = dict(command.headers)
    assert (headers["retry-after"], headers["retry-after-ms"]) == ("2", "1200")
    assert headers["x-ratelimit-limit-requests"] == "10"
    assert command.metadata == (
        *LET_IN.metadata,
        (names.METADATA_MODEL, "m"),
        (names.METADATA_REASON, "RATE_LIMIT_EXCEEDED"),
        CLOSED,
    )
    assert command.limits == ((names.METADATA_FIGURES, "1 org 10 0 100"),)
    [event] = talk.trail.events
    assert (event.actor, event.organization_id, event.request_id) == ("alice", "acme", REQUEST_ID)
    assert (event.metadata["reason"], event.metadata["model"]) == ("request_rate", "m")
    assert event.metadata["limit"]["limit"] == 10


@pytest.mark.parametrize(
    ("changes", "audited"),
    [({"authorization": None}, True), ({"content_type": "text/plain"}, False)],
    ids=["401", "415"],
)
async def test_what_is_audited_is_a_matter_of_status(changes: dict[str, Any], audited: bool) -> None:
    talk = Dialogue()
    await talk.headers(**changes)
    assert len(talk.trail.events) == audited


async def test_only_an_outage_leaves_an_entry_that_may_be_open() -> None:
    budget = LimitPolicy(budgets=(Budget(period="DAILY", limit_tokens=1),))
    policy = replace(a_policy(a_model(a_share("a"), model="m")), limits=Limits(default=budget))
    talk = limited(FakeStore(StoreUnavailable(SECRET_DETAIL)), table=replace(a_table(policy), digest=POLICY))
    await talk.headers()
    command = await talk.body(CHAT)
    assert refused(command) == (503, "service_unavailable")
    assert isinstance(command, Reply)
    assert command.metadata == (
        *LET_IN.metadata,
        (names.METADATA_MODEL, "m"),
        (names.METADATA_REASON, "SERVICE_UNAVAILABLE"),
    )
    assert "hunter2" not in command.body.decode()


async def test_answer_to_an_idempotency_key_is_kept_as_the_client_had_it() -> None:
    store = FakeStore()
    talk = limited(store)
    await talk.headers(idempotency_key="k")
    assert isinstance(await talk.body(CHAT), Forward)
    assert talk._decision.waited_for
    await answered(talk, b'{"a":', b"1}")
    [(request, answer)] = store.kept
    assert request == REQUEST_ID
    assert isinstance(answer, StoredAnswer)
    assert answer.body == b'{"a":1}'
    assert dict(answer.headers) == {"content-type": "application/json", names.HEADER_ROUTING_BACKEND: "a"}
    assert not talk._decision.waited_for


async def test_usage_event_that_the_router_asked_for_is_not_kept() -> None:
    store = FakeStore()
    talk = limited(store)
    await talk.headers(idempotency_key="k")
    await talk.body(CHAT | {"stream": True})
    events = (b'data: {"choices":[{"x":1}]}\n\n', b'data: {"choices":[],"usage":{"a":1}}\n\n', b"data: [DONE]\n\n")
    await answered(talk, b"".join(events)[:40], b"".join(events)[40:], content_type="text/event-stream")
    [(_, answer)] = store.kept
    assert isinstance(answer, StoredAnswer)
    assert answer.body == events[0] + events[2]


@pytest.mark.parametrize(
    ("parts", "status", "content_type", "kept"),
    [
        ((b"{}",), 500, "application/json", None),
        ((b"{}",), 400, "application/json", None),
        ((b"x" * 60, b"x" * 60), 200, "application/json", "too_large"),
        ((b"data: {}\n\n",), 200, "text/event-stream", None),
    ],
    ids=["failed", "refused", "large", "cut"],
)
async def test_what_cannot_be_repeated_is_not_kept(
    parts: tuple[bytes, ...], status: int, content_type: str, kept: str | None
) -> None:
    store = FakeStore()
    talk = limited(store)
    await talk.headers(idempotency_key="k")
    await talk.body(CHAT | {"stream": True})
    await answered(talk, *parts, status=status, content_type=content_type)
    assert store.kept == [(REQUEST_ID, kept)]


async def test_inference_is_kept_as_it_was_translated() -> None:
    store = FakeStore()
    talk = limited(store)
    await talk.headers(INFERENCE_PATH)
    await talk.body(INFERENCE)
    rewritten = await talk.answer(b"{}")
    assert isinstance(rewritten, Rewrite)
    [(_, kept)] = store.kept
    assert kept == "too_large"  # the translation, not the two bytes of the backend's answer
    assert len(rewritten.body) > 100


async def test_kept_answer_is_given_again_and_says_so() -> None:
    kept = StoredAnswer(status=200, headers=(("content-type", "text/event-stream"),), body=b"data: [DONE]\n\n")
    talk = limited(FakeStore(Claimed(state="done", answer=kept)))
    await talk.headers(idempotency_key="k")
    command = await talk.body(CHAT)
    assert isinstance(command, Reply)
    assert (command.status, command.body) == (200, kept.body)
    assert dict(command.headers) == {"content-type": "text/event-stream", "x-idempotent-replay": "true"}
    assert command.metadata[-2:] == ((names.METADATA_REASON, names.REASON_REPEATED), CLOSED)
    assert talk.outcomes.counted == {("chat", "repeated"): 1}


async def test_exchange_that_ends_early_lets_the_key_go() -> None:
    store = FakeStore()
    talk = limited(store)
    await talk.headers(idempotency_key="k")
    await talk.body(CHAT)
    assert talk._decision.waited_for
    await talk._decision.end()
    assert store.kept == [(REQUEST_ID, None)]
    assert not talk._decision.waited_for


# --- What the access log is told besides.


async def test_inference_is_told_with_its_ids_and_labels() -> None:
    talk = Dialogue(traceparent=TRACEPARENT)
    await talk.headers(INFERENCE_PATH)
    command = await talk.body(INFERENCE | {"metadata": {"team": "é"}})
    assert isinstance(command, Forward)
    assert command.limits == (
        (names.METADATA_TRACE, TRACEPARENT[3:52]),
        (names.METADATA_CLIENT_REQUEST_ID, REQUEST_ID),
        (names.METADATA_LABELS, '{"team":"\\u00e9"}'),
    )


@pytest.mark.parametrize("model", ["\ud800", "m" * 5_000], ids=["half a character", "long"])
async def test_models_name_that_a_client_made_up_can_be_told(model: str) -> None:
    talk = Dialogue()
    await talk.headers()
    command = await talk.body(CHAT | {"model": model})
    assert isinstance(command, Reply)
    told = dict(command.metadata)
    assert told[names.METADATA_REASON] == "MODEL_NOT_FOUND"
    assert len(str(told[names.METADATA_MODEL]).encode()) <= 256


async def test_policy_that_a_request_began_with_decides_it() -> None:
    talk = Dialogue()
    await talk.headers()
    talk.policy_changes(a_policy(a_model(a_share("a"), model="other")))
    command = await talk.body(CHAT)
    assert isinstance(command, Forward)
    assert (names.METADATA_POLICY, POLICY) in command.metadata


# --- Answers of backends that report no usage.


async def quiet(body: Mapping[str, Any], **headers: str) -> Dialogue:
    """A request to a silent backend that has been forwarded."""
    talk = limited(FakeStore(), silent=("a",))
    await talk.headers(**headers)
    assert isinstance(await talk.body(body), Forward)
    return talk


async def test_answer_of_a_silent_backend_is_wanted_and_counted() -> None:
    talk = await quiet(CHAT)
    headers = {":status": "200", "content-type": "application/json", names.HEADER_ROUTING_BACKEND: "a"}
    assert await talk.say(ResponseHeaders(headers=headers, ends=False)) == Continue(body_wanted=True)
    whole = json.dumps({"choices": [{"message": {"content": "How are you?"}}]}).encode()
    assert await talk.say(ResponseBody(body=whole[:9], ends=False)) == Continue()
    command = await talk.say(ResponseBody(body=whole[9:]))
    assert isinstance(command, Continue)
    assert dict(command.counted)[names.METADATA_TOKENS_OUTPUT] == "4"


@pytest.mark.parametrize(
    ("status", "content_type", "backend"),
    [("400", "application/json", "a"), ("200", "text/html", "a"), ("200", "application/json", "b")],
    ids=["failed", "no answer", "another backend"],
)
async def test_other_answers_are_left_alone(status: str, content_type: str, backend: str) -> None:
    talk = await quiet(CHAT)
    headers = {":status": status, "content-type": content_type, names.HEADER_ROUTING_BACKEND: backend}
    assert await talk.say(ResponseHeaders(headers=headers, ends=False)) == Continue()


async def test_stream_of_a_silent_backend_is_counted_and_kept() -> None:
    talk = await quiet(CHAT | {"stream": True}, idempotency_key="k")
    headers = {":status": "200", "content-type": "text/event-stream", names.HEADER_ROUTING_BACKEND: "a"}
    assert await talk.say(ResponseHeaders(headers=headers, ends=False)) == Continue(body_wanted=True)
    event = b'data: {"choices":[{"delta":{"content":"%s"}}]}\n\n'
    first = await talk.say(ResponseBody(body=event % b"How are", ends=False))
    assert isinstance(first, Continue)
    assert dict(first.counted)[names.METADATA_TOKENS_OUTPUT] == "2"
    last = await talk.say(ResponseBody(body=event % b" you?" + b"data: [DONE]\n\n"))
    assert isinstance(last, Continue)
    assert dict(last.counted)[names.METADATA_TOKENS_OUTPUT] == "4"
    assert not talk._decision.waited_for


# --- Our own faults.


def assert_bug_is_told_by_its_id_only(talk: Dialogue, command: Command) -> None:
    assert isinstance(command, Reply)
    assert command.status == 500
    said = command.body.decode()
    [(level, event, fields)] = talk.log.events
    assert (level, event, fields["request_id"]) == ("exception", "request_failed", REQUEST_ID)
    assert fields["error_id"] in said
    assert "hunter2" not in said
    assert "Error" not in said.replace("ERROR", "")
    assert [outcome for _, outcome in talk.outcomes.counted][-1] == Reason.BUG.value


@pytest.mark.parametrize(("path", "code"), [(CHAT_PATH, "internal_error"), (INFERENCE_PATH, "INTERNAL_ERROR")])
async def test_bug_on_the_headers_is_500_with_the_id_that_is_logged(path: str, code: str) -> None:
    talk = Dialogue(keys=FakeKeys(None, error=RuntimeError(SECRET_DETAIL)))
    command = await talk.headers(path)
    assert refused(command) == (500, code)
    assert_bug_is_told_by_its_id_only(talk, command)


class Broken:
    """Fails whatever is asked of it."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(SECRET_DETAIL)


async def test_bug_on_the_body_is_500_with_the_id_that_is_logged() -> None:
    store: Any = Broken()
    talk = Dialogue(limiter=a_limiter(store))
    await talk.headers()
    command = await talk.body(CHAT)
    assert_bug_is_told_by_its_id_only(talk, command)
    # Whether an entry was opened before nobody knows here.
    assert isinstance(command, Reply)
    assert command.metadata == (
        *LET_IN.metadata,
        (names.METADATA_MODEL, "m"),
        (names.METADATA_REASON, "INTERNAL_ERROR"),
    )


async def test_bug_on_the_answer_is_500_with_the_id_that_is_logged() -> None:
    talk = Dialogue(limiter=a_limiter(tokens=Broken()))
    await talk.headers(INFERENCE_PATH)
    await talk.body(INFERENCE)
    assert_bug_is_told_by_its_id_only(talk, await talk.answer(b"{}"))


async def test_two_bugs_have_two_ids() -> None:
    ids = set()
    for _ in range(2):
        talk = Dialogue(keys=FakeKeys(None, error=KeyError("x")))
        await talk.headers()
        ids.add(talk.log.events[0][2]["error_id"])
    assert len(ids) == 2


async def test_event_out_of_phase_is_the_servers_to_handle() -> None:
    with pytest.raises(OutOfPhase):
        await Dialogue().body(CHAT)


def test_request_is_small() -> None:
    """The one mutable object of a request must not become a bag (style, rule 5)."""
    assert len(Decision.__slots__) <= 9
    assert len(Answering.__slots__) <= 9
    assert not hasattr(Decision, "__dict__") or "__dict__" not in dir(Decision.__new__(Decision))
