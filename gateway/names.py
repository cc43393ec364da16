"""Every header, metadata key, cluster and resource name that two programs must agree on.

A name is written once, here. A test fails on an ``x-router-`` literal anywhere else.
"""

from __future__ import annotations

from typing import Final

# --- Request headers, set by ext_proc and read by Envoy's routes; client-sent ones are stripped.
INTERNAL_HEADER_PREFIX: Final = "x-router-"
HEADER_ORGANIZATION: Final = "x-router-org"
HEADER_ADMIN: Final = "x-router-admin"
"""``true`` on what an API key with the admin scope asks of the ledger: it may see every organisation."""
HEADER_MODEL: Final = "x-router-model"
HEADER_VARIANT: Final = "x-router-variant"
"""Present only when an allow or deny list leaves this key a subset of the model's backends."""
HEADER_MODEL_SPAN: Final = "x-router-model-span"
"""``<offset>:<length>`` in bytes of the JSON string that is the body's ``model`` value."""
HEADER_ENDPOINT: Final = "x-router-endpoint"
"""Which endpoint was called, where ext_proc has replaced the path."""
HEADER_BACKEND: Final = "x-router-backend"
"""Set on the internal hop by a ``be_`` cluster: which backend this attempt goes to."""

HEADER_API_KEY: Final = "x-api-key"
HEADER_AUTHORIZATION: Final = "authorization"
HEADER_SIGNATURE: Final = "x-hmac-signature"
HEADER_REQUEST_ID: Final = "x-request-id"
HEADER_IDEMPOTENCY_KEY: Final = "idempotency-key"

FORWARDED_HEADERS: Final = (
    ":path",
    ":status",
    HEADER_API_KEY,
    HEADER_AUTHORIZATION,
    HEADER_IDEMPOTENCY_KEY,
    HEADER_REQUEST_ID,
    HEADER_SIGNATURE,
    "content-encoding",
    "content-length",
    "content-type",
    "x-routing-backend",
    "x-routing-decision",
)
"""All that ext_proc is told of a request's and an answer's headers."""

# --- Response headers a client can rely on.
HEADER_ROUTING_BACKEND: Final = "x-routing-backend"
HEADER_ROUTING_DECISION: Final = "x-routing-decision"
HEADER_OVERHEAD_MS: Final = "x-router-overhead-ms"
HEADER_WARNING: Final = "warning"
HEADER_RETRY_AFTER: Final = "retry-after"
HEADER_RETRY_AFTER_MS: Final = "retry-after-ms"
HEADER_SHOULD_RETRY: Final = "x-should-retry"
HEADER_IDEMPOTENT_REPLAY: Final = "x-idempotent-replay"
NO_STORE: Final = ("cache-control", "no-store")
"""On every answer of the audit endpoints, whoever of the three gives it."""
RATE_LIMIT_HEADERS: Final = tuple(
    f"x-ratelimit-{figure}-{unit}" for unit in ("requests", "tokens") for figure in ("limit", "remaining", "reset")
)
"""Each is also the key of its value in ``LIMITS_NAMESPACE``."""

# --- Dynamic metadata written by ext_proc, read by Lua, response headers and the access log.
METADATA_NAMESPACE: Final = "router"
METADATA_STRIP_USAGE: Final = "strip_usage"
METADATA_STREAM: Final = "stream"
METADATA_ORGANIZATION: Final = "organization_id"
METADATA_KEY: Final = "api_key_id"
METADATA_MODEL: Final = "model"
METADATA_PRICES: Final = "prices"
"""What the candidates' tokens cost, as ``policies.price.written`` puts it: usage costs what it did at its admission."""
METADATA_CHARGE_TO: Final = "charge_to"
"""What the request's use counts towards, such as ``org:DAILY org:MONTHLY``."""
METADATA_CLOSED: Final = "closed"
"""True on a reply of ext_proc's that leaves no ledger entry open."""
METADATA_ENDPOINT: Final = "endpoint"
"""Which endpoint was called: a value of ``gateway.endpoints.Kind``."""
METADATA_POLICY: Final = "policy"
"""Digest of the policy that the request was decided by."""
METADATA_REASON: Final = "reason"
"""Why ext_proc answered itself: a code of the error catalogue, or one of the two below. Absent: it was forwarded."""
REASON_REPEATED: Final = "REPEATED"
"""The answer kept for the request's idempotency key was given again."""
REASON_LISTED: Final = "LISTED"
"""A list of models, or what the ledger knows."""
LIMITS_NAMESPACE: Final = "router.limits"
"""Dynamic metadata that differs from request to request: values of RATE_LIMIT_HEADERS, and those that follow."""
METADATA_TOKENS_INPUT: Final = "tokens_input"
"""Input tokens as estimated at admission, in decimal."""
METADATA_TOKENS_OUTPUT: Final = "tokens_output"
"""Output tokens granted, in decimal. It is there whenever a ledger entry may be open."""
METADATA_ADMITTED_MS: Final = "admitted_ms"
"""When the request was admitted, in decimal unix milliseconds: by the limit store's clock, which says what period its
budgets were charged in; by ext_proc's where it was let through without the store."""
METADATA_FIGURES: Final = "figures"
"""Every limit that was consulted and what it had left, as ``limits.figures.written`` puts it."""
METADATA_TRACE: Final = "trace"
"""``<trace id>-<span id>`` where the request is traced."""
METADATA_CLIENT_REQUEST_ID: Final = "client_request_id"
"""``request_id`` of a call to /v1/inference."""
METADATA_LABELS: Final = "labels"
"""``metadata`` of a call to /v1/inference, as a JSON object."""
USAGE_NAMESPACE: Final = "router.usage"
"""Dynamic metadata that json_to_metadata and sse_to_metadata fill with token counts: the two keys above and this."""
METADATA_TOKENS_INPUT_CACHED: Final = "tokens_input_cached"
"""Input tokens that the backend had cached; they are part of the input tokens."""
METADATA_TOKENS_OUTPUT_REASONING: Final = "tokens_output_reasoning"
"""Output tokens that the model spent on reasoning; they are part of the output tokens."""
METADATA_EVENTS: Final = "events"
"""How many events with text a stream has sent so far; Lua counts them in ``USAGE_NAMESPACE``."""
COUNTED_NAMESPACE: Final = "router.counted"
"""Dynamic metadata of an answer without usage whose body ext_proc has seen: the tokenizer's counts under
METADATA_TOKENS_INPUT and METADATA_TOKENS_OUTPUT, in decimal."""

CLUSTER_METADATA_BACKEND_ID: Final = "backend_id"

DECIDED_DETAILS: Final = "router_decided"
"""Response code details of what ext_proc answers: Envoy's local reply rules leave it as it is."""

# --- Envoy resources.
LISTENER_PUBLIC: Final = "public"
LISTENER_BACKENDS: Final = "backends"
"""The internal listener: one route per backend, entered through its ``be_`` cluster."""
ROUTE_CONFIG_BACKENDS: Final = "backends"
CLUSTER_XDS: Final = "router_xds"
CLUSTER_EXTPROC: Final = "router_extproc"
CLUSTER_STATUS: Final = "router_status"
"""The ext_proc supervisor's status server: answers readiness."""
CLUSTER_USAGE: Final = "router_usage"
"""The ledger: receives the access log."""
CLUSTER_AUDIT: Final = "router_audit"
"""The ledger's HTTP server: answers what happened to a request."""
CLUSTER_TRACING: Final = "router_tracing"
CLUSTER_UNROUTED: Final = "router_unrouted"
"""Has no endpoints: where a request points before ext_proc has chosen its model."""
SCOPE_UNROUTED: Final = "-"
"""Value of the model header, and so the route scope, before ext_proc has decided."""
ACCESS_LOG_SERVICE: Final = "envoy.service.accesslog.v3.AccessLogService"
EXTPROC_SERVICE: Final = "envoy.service.ext_proc.v3.ExternalProcessor"
NODE_ID: Final = "api-router"


def entry_cluster(backend_id: str) -> str:
    """Cluster that a model's route weighs: a hop through the internal listener to one backend."""
    return f"be_{backend_id}"


def backend_cluster(backend_id: str) -> str:
    """Cluster that holds a backend's real endpoints, health checks and ejection."""
    return f"bk_{backend_id}"


def credential_secret(backend_id: str) -> str:
    """SDS secret with a backend's provider credential."""
    return f"credential/{backend_id}"


def model_routes(model: str) -> str:
    """RouteConfiguration and scope of one model."""
    return f"model/{model}"


def variant(backend_ids: frozenset[str]) -> str:
    """Value of the variant header for a subset of backends, the same in every program."""
    return ",".join(sorted(backend_ids))
