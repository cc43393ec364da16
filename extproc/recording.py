"""The answer of one request on its way back, kept for those who send its idempotency key again.

ext_proc sees a stream before Lua has taken out the usage event that the router asked for, so it is taken out here too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Final, Literal

from gateway import names
from gateway.endpoints import Kind
from gateway.errors import StoreUnavailable
from gateway.telemetry import Logger
from limits.model import Claim, StoredAnswer
from limits.store import LimitStore
from policies.model import OrganizationId

KEPT_HEADERS: Final = ("content-type", names.HEADER_ROUTING_BACKEND, names.HEADER_ROUTING_DECISION)


_DONE: Final = re.compile(rb"^data:\s*\[DONE\]\s*\Z", re.MULTILINE)
_ENDS: Final[Mapping[Kind, re.Pattern[bytes]]] = {
    Kind.CHAT: _DONE,
    Kind.COMPLETION: _DONE,
    Kind.EMBEDDING: re.compile(b""),
    Kind.RESPONSE: re.compile(rb'"type"\s*:\s*"response\.(?:completed|incomplete)"'),
}
"""What a stream has at its end when nothing is missing. Source: OpenAI API reference, "Streaming"."""
_EVENT: Final = re.compile(rb".*?(?:\r?\n\r?\n|\Z)", re.DOTALL)
_NO_CHOICES: Final = re.compile(rb'"choices"\s*:\s*\[\s*\]')
_USAGE: Final = re.compile(rb'"usage"\s*:\s*\{')


class Recording:
    """Collects an answer part by part. Without a claim it only remembers the headers.

    ``max_bytes`` bounds what is held: of a larger answer only that it was too large is kept.
    """

    __slots__ = (
        "_claim",
        "_kind",
        "_max_bytes",
        "_organization_id",
        "_parts",
        "_request_id",
        "_size",
        "_store",
        "_without_usage",
        "headers",
    )

    def __init__(
        self,
        *,
        claim: Claim | None,
        store: LimitStore | None,
        organization_id: OrganizationId,
        request_id: str,
        max_bytes: int,
        kind: Kind,
        without_usage: bool,
    ) -> None:
        """``kind`` is of the backend call: it tells how a whole stream ends. ``without_usage``: Lua strips it too."""
        self.headers: Mapping[str, str] = {}
        self._kind = kind
        self._without_usage = without_usage
        self._claim = claim
        self._store = store
        self._organization_id = organization_id
        self._request_id = request_id
        self._max_bytes = max_bytes
        self._parts: list[bytes] = []
        self._size = 0

    @property
    def holds_claim(self) -> bool:
        """Whether an idempotency key waits for this answer."""
        return self._claim is not None

    def add(self, part: bytes) -> None:
        """One more part of the body."""
        if self._claim is None:
            return
        self._size += len(part)
        if self._size > self._max_bytes:
            self._parts.clear()
        else:
            self._parts.append(part)

    async def keep(self, *, status: int, log: Logger) -> None:
        """The answer is complete. Only a success is kept: after anything else the request may be tried again.

        A store that is down keeps nothing, and the answer goes to the client all the same.
        """
        if not 200 <= status < 300:  # noqa: PLR2004
            await self._finish(None, log)
        elif self._size > self._max_bytes:
            await self._finish("too_large", log)
        else:
            body = b"".join(self._parts)
            headers = tuple((name, self.headers[name]) for name in KEPT_HEADERS if name in self.headers)
            answer = StoredAnswer(status=status, headers=headers, body=body)
            if self.headers.get("content-type", "").startswith("text/event-stream"):
                await self._finish(self._whole_stream(answer), log)
            else:
                await self._finish(answer, log)

    def _whole_stream(self, answer: StoredAnswer) -> StoredAnswer | None:
        """A stream as the client had it; None for one that was cut short."""
        if not _ENDS[self._kind].search(answer.body):
            return None
        return replace(answer, body=strip_usage(answer.body)) if self._without_usage else answer

    async def let_go(self, log: Logger) -> None:
        """There will be no complete answer: the next request with the key is the first again."""
        await self._finish(None, log)

    async def _finish(self, answer: StoredAnswer | Literal["too_large"] | None, log: Logger) -> None:
        claim, store, self._claim = self._claim, self._store, None
        if claim is None or store is None:
            return
        try:
            await store.finish(self._organization_id, self._request_id, claim.key, answer)
        except StoreUnavailable as error:
            log.warning("answer_not_kept", request_id=self._request_id, error=str(error))


def strip_usage(stream: bytes) -> bytes:
    """An event stream without events that report usage and nothing else, as ``strip_usage.lua`` leaves it."""
    events = _EVENT.findall(stream)
    return b"".join(event for event in events if not (_NO_CHOICES.search(event) and _USAGE.search(event)))
