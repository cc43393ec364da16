"""A request that has ended, or an attempt at a backend that failed, as Envoy tells of it. Pure.

Envoy tells twice: at once by gRPC (:mod:`usage.access_log`), and in a file (:mod:`usage.journal`). Both come to the
same values here. What the metadata means is in ``gateway/names.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final

from gateway import names
from policies import price
from policies.model import BackendId, KeyId, ModelName, OrganizationId, Price

TOKENS_MAX: Final = 10**9
"""What a backend counts beyond it is no count of tokens, and sums of it would not stay exact in the store."""

STARTED_MAX_US: Final = 253_402_300_800_000_000
"""The year 10000, which no date can name."""

LIMITS_USED: Final = (
    names.METADATA_TOKENS_INPUT,
    names.METADATA_TOKENS_OUTPUT,
    names.METADATA_ADMITTED_MS,
    names.METADATA_FIGURES,
    names.METADATA_TRACE,
    names.METADATA_CLIENT_REQUEST_ID,
    names.METADATA_LABELS,
)
"""What is read of LIMITS_NAMESPACE."""

Value = str | float | bool
Fields = Mapping[str, Value]
NONE: Final[Fields] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenUsage:
    """Tokens; a count that was left out is 0. Cached ones are part of the input, reasoning ones of the output."""

    tokens_input: int
    tokens_output: int
    tokens_input_cached: int = 0
    tokens_output_reasoning: int = 0

    def within(self) -> TokenUsage:
        """No more cached tokens than input, and no more reasoning tokens than output, whatever a backend says."""
        cached = min(self.tokens_input_cached, self.tokens_input)
        reasoning = min(self.tokens_output_reasoning, self.tokens_output)
        if (cached, reasoning) == (self.tokens_input_cached, self.tokens_output_reasoning):
            return self
        return replace(self, tokens_input_cached=cached, tokens_output_reasoning=reasoning)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """One request of the public listener that has ended.

    ``organization_id`` is '' where nobody was known, and then ``request_id`` may be, of what is no request. ``path`` is
    without its query. ``backend`` is '' where none answered, ``last_backend`` the one that was tried last. ``status``
    is 0 where the client had left before there was one. ``reason`` says why ext_proc answered itself, '' where it did
    not. ``admitted_ms`` is the moment of its admission, 0 where none was told. ``reported`` is None where the backend
    said nothing, ``counted`` where the tokenizer has not looked. ``events`` with text have been sent of a stream.
    ``tokens_input`` is the estimate and ``tokens_output`` the grant of its admission; ``prices`` are those of its
    candidates then, as ``policies.price`` writes them. ``admitted``: it may have left a ledger entry open. ``flags``
    are Envoy's response flags, in its short form.
    """

    request_id: str
    organization_id: OrganizationId
    key_id: KeyId
    model: ModelName
    endpoint: str
    path: str
    stream: bool
    backend: BackendId
    last_backend: BackendId
    decision: str
    status: int
    flags: tuple[str, ...]
    reason: str
    attempts: int
    started_us: int
    admitted_ms: int
    duration_ms: int
    body_bytes: int
    admitted: bool
    reported: TokenUsage | None
    counted: TokenUsage | None
    events: int
    tokens_input: int
    tokens_output: int
    prices: str
    charge_to: str
    policy: str
    figures: str
    trace: str
    client_request_id: str
    labels: str

    @property
    def ended_us(self) -> int:
        """When it ended, in unix microseconds."""
        return self.started_us + 1000 * self.duration_ms


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedAttempt:
    """One attempt at one backend that did not answer the client."""

    request_id: str
    backend: BackendId
    status: int
    flags: tuple[str, ...]
    started_us: int
    duration_ms: int


class Malformed(ValueError):
    """An entry that cannot be used."""


def finished(
    *,
    request_id: str,
    path: str,
    status: int,
    flags: tuple[str, ...],
    attempts: int,
    started_us: int,
    duration_ms: int,
    body_bytes: int,
    backend: str,
    decision: str,
    cluster: str,
    said: Fields,
    limits: Fields,
    usage: Fields,
    counted: Fields,
) -> Finished:
    """Put together what was told; the last four are the namespaces of dynamic metadata.

    Raises:
        Malformed: it cannot be used.
    """
    organization = _text(said, names.METADATA_ORGANIZATION)
    client_request_id = _text(limits, names.METADATA_CLIENT_REQUEST_ID)
    if organization and not request_id:
        raise Malformed("it names no request")
    check_storable(started_us, request_id, organization, client_request_id)
    return Finished(
        request_id=request_id,
        organization_id=OrganizationId(organization),
        key_id=KeyId(_text(said, names.METADATA_KEY)),
        model=ModelName(_text(said, names.METADATA_MODEL)),
        endpoint=_text(said, names.METADATA_ENDPOINT),
        path=path.partition("?")[0],  # a query may have a key in it
        stream=said.get(names.METADATA_STREAM) is True,
        backend=BackendId(backend),
        last_backend=BackendId(backend or _backend_of(cluster)),
        decision=decision,
        status=status,
        flags=flags,
        reason=_text(said, names.METADATA_REASON),
        attempts=attempts,
        started_us=started_us,
        admitted_ms=_moment_ms(limits, names.METADATA_ADMITTED_MS),
        duration_ms=duration_ms,
        body_bytes=body_bytes,
        admitted=bool(organization) and said.get(names.METADATA_CLOSED) is not True,
        reported=_reported(usage),
        counted=_counted(counted),
        events=_count(usage, names.METADATA_EVENTS) or 0,
        tokens_input=_decimal(limits, names.METADATA_TOKENS_INPUT),
        tokens_output=_decimal(limits, names.METADATA_TOKENS_OUTPUT),
        prices=_text(said, names.METADATA_PRICES),
        charge_to=_text(said, names.METADATA_CHARGE_TO),
        policy=_text(said, names.METADATA_POLICY),
        figures=_text(limits, names.METADATA_FIGURES),
        trace=_text(limits, names.METADATA_TRACE),
        client_request_id=client_request_id,
        labels=_text(limits, names.METADATA_LABELS),
    )


def _backend_of(cluster: str) -> str:
    """The backend that a cluster leads to; '' for those that lead to none, which only the journal names."""
    prefix = names.entry_cluster("")
    return cluster.removeprefix(prefix) if cluster.startswith(prefix) else ""


def check_storable(started_us: int, *texts: str) -> None:
    """Raise Malformed where the spool could not hold a start, or a text because UTF-8 cannot."""
    if not 0 <= started_us < STARTED_MAX_US:
        raise Malformed(f"no start: {started_us}")
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise Malformed(f"not a text: {error}") from error


@lru_cache(maxsize=1024)
def prices_of(line: str) -> Mapping[str, Price]:
    """The same object for the same line: requests of one model have the same.

    Raises:
        Malformed: ``policies.price`` has not written it.
    """
    try:
        return price.read(line)
    except ValueError as error:
        raise Malformed(f"{names.METADATA_PRICES} cannot be read: {error}") from None


def _text(fields: Fields, key: str) -> str:
    value = fields.get(key, "")
    return value if isinstance(value, str) else ""


def _decimal(fields: Fields, key: str) -> int:
    return min(_whole(fields, key), TOKENS_MAX)


def _moment_ms(fields: Fields, key: str) -> int:
    """0 where there is none that a date can name."""
    moment_ms = _whole(fields, key)
    return moment_ms if moment_ms < STARTED_MAX_US // 1000 else 0


def _whole(fields: Fields, key: str) -> int:
    text = _text(fields, key)
    if text and not (text.isascii() and text.isdecimal()):
        raise Malformed(f"{key} is not a number: {text!r}")
    return int(text or 0)


def _count(fields: Fields, key: str) -> int | None:
    """A backend's own number; None where it is none."""
    number = fields.get(key)
    if isinstance(number, bool) or not isinstance(number, int | float):
        return None
    return int(number) if math.isfinite(number) and 0 <= number <= TOKENS_MAX else None


def _reported(usage: Fields) -> TokenUsage | None:
    tokens_input = _count(usage, names.METADATA_TOKENS_INPUT)
    tokens_output = _count(usage, names.METADATA_TOKENS_OUTPUT)
    if tokens_input is None and tokens_output is None:
        return None
    return TokenUsage(
        tokens_input=tokens_input or 0,
        tokens_output=tokens_output or 0,
        tokens_input_cached=_count(usage, names.METADATA_TOKENS_INPUT_CACHED) or 0,
        tokens_output_reasoning=_count(usage, names.METADATA_TOKENS_OUTPUT_REASONING) or 0,
    )


def _counted(counted: Fields) -> TokenUsage | None:
    if not counted:
        return None
    return TokenUsage(
        tokens_input=_decimal(counted, names.METADATA_TOKENS_INPUT),
        tokens_output=_decimal(counted, names.METADATA_TOKENS_OUTPUT),
    )
