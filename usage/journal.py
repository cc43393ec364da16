"""Codec of the journal: a JSON line for each request that has ended, as ``xds.resources.listeners.journal`` has it."""

from __future__ import annotations

from typing import Any, Final

from gateway import names
from policies.model import BackendId
from usage.finished import NONE, FailedAttempt, Fields, Finished, Malformed, check_storable, finished
from usage.json_text import from_json

_REQUEST_ID: Final = b'"request_id":"'
_NUMBER_MAX: Final = 2**53
BEGINS: Final = b'{"attempts":'
"""How Envoy begins every line: it sorts keys."""
_ATTEMPT: Final = f'"listener":"{names.LISTENER_BACKENDS}"'.encode()


def last_of(line: bytes) -> bytes:
    """The line, without what is before the last place where one begins: a part of another, which a full disk has torn.

    Quotes inside of values are escaped, so nobody can make a line seem to begin.
    """
    at = line.rfind(BEGINS, 1)
    return line if at < 0 else line[at:]


def is_attempt(line: bytes) -> bool:
    """Whether a line tells of a failed attempt. Quotes inside of values are escaped, so nobody can make it seem so."""
    return _ATTEMPT in last_of(line)


def request_id_of(line: bytes) -> str:
    """The request id of a line without decoding all of it; '' where it has none."""
    _, _, rest = last_of(line).partition(_REQUEST_ID)
    return rest[: rest.find(b'"')].decode("latin-1")


def decode_line(line: bytes) -> Finished | FailedAttempt:
    """What a line tells.

    Raises:
        Malformed: it cannot be used.
    """
    try:
        told = from_json(last_of(line))
        if told["listener"] == names.LISTENER_BACKENDS:
            return _attempt(told)
        return finished(
            request_id=_text(told, "request_id"),
            path=_text(told, "path"),
            status=_number(told, "status"),
            flags=_flags(told),
            attempts=_number(told, "attempts"),
            started_us=_us(told["started"]),
            duration_ms=_number(told, "duration_ms"),
            body_bytes=_number(told, "body_bytes"),
            backend=_text(told, "backend"),
            decision=_text(told, "decision"),
            cluster=_text(told, "cluster"),
            said=_fields(told, names.METADATA_NAMESPACE),
            limits=_fields(told, names.LIMITS_NAMESPACE),
            usage=_fields(told, names.USAGE_NAMESPACE),
            counted=_fields(told, names.COUNTED_NAMESPACE),
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise error if isinstance(error, Malformed) else Malformed(f"{type(error).__name__}: {error}") from error


def _attempt(told: dict[str, Any]) -> FailedAttempt:
    attempt = FailedAttempt(
        request_id=_text(told, "request_id"),
        backend=BackendId(_text(told, "cluster").removeprefix(names.backend_cluster(""))),
        status=_number(told, "status"),
        flags=_flags(told),
        started_us=_us(told["started"]),
        duration_ms=_number(told, "duration_ms"),
    )
    check_storable(attempt.started_us, attempt.request_id, attempt.backend, *attempt.flags)
    return attempt


def _text(told: dict[str, Any], name: str) -> str:
    value = told.get(name, "")
    if not isinstance(value, str):
        raise Malformed(f"{name} is not a text: {value!r}")
    return value


def _number(told: dict[str, Any], name: str) -> int:
    value = told.get(name, 0)
    if type(value) is not int or not 0 <= value <= _NUMBER_MAX:
        raise Malformed(f"{name} is not a number: {value!r}")
    return value


def _flags(told: dict[str, Any]) -> tuple[str, ...]:
    text = _text(told, "flags")
    return () if text in {"", "-"} else tuple(text.split(","))


def _us(started: str) -> int:
    """Microseconds of seconds with nine decimals."""
    seconds, _, nanos = started.partition(".")
    return int(seconds) * 1_000_000 + int(nanos) // 1000


def _fields(told: dict[str, Any], namespace: str) -> Fields:
    found = told.get(namespace, NONE)
    return found if isinstance(found, dict) else NONE
