"""Codec of the journal: a JSON line for each request that has ended, as ``xds.resources.listeners.journal`` has it."""

from __future__ import annotations

import json
from typing import Any, Final

from gateway import names
from policies.model import BackendId
from usage.finished import NONE, FailedAttempt, Fields, Finished, Malformed, finished

_REQUEST_ID: Final = b'"request_id":"'
_ATTEMPT: Final = f'"listener":"{names.LISTENER_BACKENDS}"'.encode()


def is_attempt(line: bytes) -> bool:
    """Whether a line tells of a failed attempt. Quotes inside of values are escaped, so nobody can make it seem so."""
    return _ATTEMPT in line


def request_id_of(line: bytes) -> str:
    """The request id of a line without decoding all of it; '' where it has none."""
    _, _, rest = line.partition(_REQUEST_ID)
    return rest[: rest.find(b'"')].decode("latin-1")


def decode_line(line: bytes) -> Finished | FailedAttempt:
    """What a line tells.

    Raises:
        Malformed: it cannot be used.
    """
    try:
        told = json.loads(line)
        if told["listener"] == names.LISTENER_BACKENDS:
            return _attempt(told)
        return finished(
            request_id=told.get("request_id", ""),
            path=told.get("path", ""),
            status=told.get("status", 0),
            flags=_flags(told),
            attempts=told.get("attempts", 0),
            started_us=_us(told["started"]),
            duration_ms=told.get("duration_ms", 0),
            body_bytes=told.get("body_bytes", 0),
            backend=told.get("backend", ""),
            decision=told.get("decision", ""),
            cluster=told.get("cluster", ""),
            said=_fields(told, names.METADATA_NAMESPACE),
            limits=_fields(told, names.LIMITS_NAMESPACE),
            usage=_fields(told, names.USAGE_NAMESPACE),
            counted=_fields(told, names.COUNTED_NAMESPACE),
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise error if isinstance(error, Malformed) else Malformed(f"{type(error).__name__}: {error}") from error


def _attempt(told: dict[str, Any]) -> FailedAttempt:
    return FailedAttempt(
        request_id=told.get("request_id", ""),
        backend=BackendId(told.get("cluster", "").removeprefix(names.backend_cluster(""))),
        status=told.get("status", 0),
        flags=_flags(told),
        started_us=_us(told["started"]),
        duration_ms=told.get("duration_ms", 0),
    )


def _flags(told: dict[str, Any]) -> tuple[str, ...]:
    text = told.get("flags", "-")
    return () if text == "-" else tuple(text.split(","))


def _us(started: str) -> int:
    """Microseconds of seconds with nine decimals."""
    seconds, _, nanos = started.partition(".")
    return int(seconds) * 1_000_000 + int(nanos) // 1000


def _fields(told: dict[str, Any], namespace: str) -> Fields:
    found = told.get(namespace, NONE)
    return found if isinstance(found, dict) else NONE
