"""Client of a mock backend's control paths, for tests: :class:`MockControl` and :class:`AsyncMockControl`."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

import httpx

from mocks.faults import FaultInvalid

TIMEOUT_S: Final = 30.0

Call = tuple[str, str, Mapping[str, Any] | None]
"""Method, path and JSON body of a control request."""

HEAL: Final[Call] = ("DELETE", "/__fault", None)
RELEASE: Final[Call] = ("POST", "/__release", None)
CLEAR: Final[Call] = ("DELETE", "/__requests", None)
COUNT: Final[Call] = ("GET", "/__requests/count", None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """One request as the backend received it."""

    number: int
    method: str
    path: str
    host: str
    headers: tuple[tuple[str, str], ...]
    body: bytes
    time: float
    fault: str | None
    answered: bool
    disconnected: bool

    def header(self, name: str) -> str | None:
        """Value of the first header of that name, in any case."""
        return next((value for n, value in self.headers if n.lower() == name.lower()), None)

    def all_headers(self, name: str) -> tuple[str, ...]:
        """Values of every header of that name, in any case."""
        return tuple(value for n, value in self.headers if n.lower() == name.lower())

    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """Numbers since the last clear; ``open`` and ``held`` are of now."""

    total: int
    open: int
    held: int
    health: int


def _fail(kind: str, fields: Mapping[str, Any]) -> Call:
    return "PUT", "/__fault", {"kind": kind, **fields}


def _requests(last: int | None) -> Call:
    return "GET", "/__requests" if last is None else f"/__requests?last={last}", None


def _checked(response: httpx.Response) -> Any:
    if response.status_code == httpx.codes.BAD_REQUEST:
        raise FaultInvalid(response.json()["error"])
    response.raise_for_status()
    return response.json()


def _received(rows: Any) -> tuple[Received, ...]:
    return tuple(
        Received(
            **row
            | {"headers": tuple((name, value) for name, value in row["headers"]), "body": base64.b64decode(row["body"])}
        )
        for row in rows
    )


class MockControl:
    """Control of one mock backend from synchronous code."""

    def __init__(self, base_url: str, *, verify: bool = True) -> None:
        self.base_url = base_url
        self._client = httpx.Client(base_url=base_url, verify=verify, timeout=TIMEOUT_S, trust_env=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def _call(self, call: Call) -> Any:
        method, path, body = call
        return _checked(self._client.request(method, path, json=body))

    def fail(self, kind: str, **fields: Any) -> None:
        """Put a fault in force; fields as in :class:`mocks.faults.Fault`.

        Raises:
            FaultInvalid: no such kind or field, or a value out of its range.
        """
        self._call(_fail(kind, fields))

    def heal(self) -> None:
        """No fault any more, /health included."""
        self._call(HEAL)

    def release(self) -> None:
        """Let the held requests go on."""
        self._call(RELEASE)

    def requests(self, last: int | None = None) -> tuple[Received, ...]:
        """The journal, oldest first, or its last entries."""
        return _received(self._call(_requests(last)))

    def clear(self) -> None:
        """Forget the requests."""
        self._call(CLEAR)

    def count(self) -> int:
        """Requests since the last clear; health checks and control requests do not count."""
        return self.counts().total

    def counts(self) -> Count:
        """Every number there is."""
        return Count(**self._call(COUNT))

    def keep_bodies(self, keep: bool) -> None:
        """Whether the journal keeps bodies."""
        self._call(("PUT", "/__requests", {"bodies": keep}))

    def completions_format(self, form: str) -> None:
        """``text`` for ``{"text", "tokens_used"}``, ``openai`` for OpenAI's own."""
        self._call(("PUT", "/__format", {"completions": form}))


class AsyncMockControl:
    """Control of one mock backend from asyncio code; methods as in :class:`MockControl`."""

    def __init__(self, base_url: str, *, verify: bool = True) -> None:
        self.base_url = base_url
        self._client = httpx.AsyncClient(base_url=base_url, verify=verify, timeout=TIMEOUT_S, trust_env=False)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def _call(self, call: Call) -> Any:
        method, path, body = call
        return _checked(await self._client.request(method, path, json=body))

    async def fail(self, kind: str, **fields: Any) -> None:
        """Put a fault in force."""
        await self._call(_fail(kind, fields))

    async def heal(self) -> None:
        """No fault any more, /health included."""
        await self._call(HEAL)

    async def release(self) -> None:
        """Let the held requests go on."""
        await self._call(RELEASE)

    async def requests(self, last: int | None = None) -> tuple[Received, ...]:
        """The journal, oldest first, or its last entries."""
        return _received(await self._call(_requests(last)))

    async def clear(self) -> None:
        """Forget the requests."""
        await self._call(CLEAR)

    async def count(self) -> int:
        """Requests since the last clear."""
        return (await self.counts()).total

    async def counts(self) -> Count:
        """Every number there is."""
        return Count(**await self._call(COUNT))
