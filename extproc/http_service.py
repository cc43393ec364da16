"""A service that decisions need, over HTTP: one deadline for a call, bounded answers, one error for every fault."""

from __future__ import annotations

import ssl
from typing import Any, Final

import httpx

from extproc.keys.deadline import within
from gateway.errors import StoreUnavailable

ANSWER_MAX_BYTES: Final = 65_536
CONNECTIONS_MAX: Final = 64
_TRIES: Final = 2


def service_client() -> httpx.AsyncClient:
    """Client for services. It ignores proxies and .netrc of the environment: keys must not pass through them."""
    return httpx.AsyncClient(
        verify=ssl.create_default_context(),
        trust_env=False,
        follow_redirects=False,
        timeout=None,  # noqa: S113 - one deadline for the whole call, below
        limits=httpx.Limits(max_connections=CONNECTIONS_MAX, max_keepalive_connections=16),
    )


class HttpService:
    """The service ``name`` at ``url``, which the setting ``variable`` names; ``timeout_s`` is for a whole call.

    Does not own the client.

    Raises:
        ValueError: the URL is not http or https.
    """

    def __init__(self, client: httpx.AsyncClient, *, name: str, variable: str, url: str, timeout_s: float) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"{variable} must begin with http:// or https://")
        self.name = name
        self._client = client
        self._url = url.rstrip("/")
        self._timeout_s = timeout_s

    async def call(self, method: str, path: str, *, json: Any = None) -> tuple[int, bytes]:
        """Status and body of the answer.

        Raises:
            StoreUnavailable: no answer in time, or one that is too large.
        """
        try:
            return await within(self._timeout_s, self._ask(method, path, json))
        except TimeoutError as error:
            raise StoreUnavailable(f"{self.name}: no answer within {self._timeout_s:g} s") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise StoreUnavailable(f"{self.name}: {type(error).__name__}") from error

    async def _ask(self, method: str, path: str, json: Any) -> tuple[int, bytes]:
        for tries_left in reversed(range(_TRIES)):
            try:
                return await self._ask_once(method, path, json)
            except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError):
                if not tries_left:  # once may be an idle connection that the service has just closed
                    raise
        raise AssertionError("unreachable")

    async def _ask_once(self, method: str, path: str, json: Any) -> tuple[int, bytes]:
        async with self._client.stream(method, self._url + path, json=json) as response:
            body = b""
            async for part in response.aiter_bytes():
                body += part
                if len(body) > ANSWER_MAX_BYTES:
                    raise StoreUnavailable(f"{self.name}: the answer is larger than {ANSWER_MAX_BYTES} bytes")
            return response.status_code, body
