"""What a mock backend received: every request, bounded by number and by the bytes of the bodies."""

from __future__ import annotations

import base64
from collections import deque
from dataclasses import dataclass
from typing import Any, Final

REQUESTS_MAX: Final = 20_000
BODIES_MAX_BYTES: Final = 64 * 1024 * 1024


@dataclass(slots=True, kw_only=True)
class Entry:
    """One request exactly as received, and what became of it."""

    number: int
    method: str
    path: str
    """Request target with its query, any path prefix included."""
    headers: tuple[tuple[str, str], ...]
    """In the order and the spelling received."""
    body: bytes
    time: float
    """Unix seconds."""
    fault: str | None = None
    answered: bool = False
    """The whole answer was written."""
    disconnected: bool = False
    """The client left before that."""

    def as_json(self) -> dict[str, Any]:
        """JSON form, as ``GET /__requests`` shows it."""
        return {
            "number": self.number,
            "method": self.method,
            "path": self.path,
            "host": next((value for name, value in self.headers if name.lower() == "host"), ""),
            "headers": [list(header) for header in self.headers],
            "body": base64.b64encode(self.body).decode(),
            "time": self.time,
            "fault": self.fault,
            "answered": self.answered,
            "disconnected": self.disconnected,
        }


class Journal:
    """The last requests, oldest first. The oldest go when there are too many or their bodies are too large."""

    def __init__(
        self, *, requests_max: int = REQUESTS_MAX, bodies_max_bytes: int = BODIES_MAX_BYTES, keep_bodies: bool = True
    ) -> None:
        self.keep_bodies = keep_bodies
        self.total = 0
        """Requests since the last :meth:`clear`, dropped ones included."""
        self._requests_max = requests_max
        self._bodies_max_bytes = bodies_max_bytes
        self._bodies_bytes = 0
        self._entries: deque[Entry] = deque()

    def add(self, *, method: str, path: str, headers: tuple[tuple[str, str], ...], body: bytes, time: float) -> Entry:
        """Write down a request."""
        self.total += 1
        kept = body if self.keep_bodies else b""
        entry = Entry(number=self.total, method=method, path=path, headers=headers, body=kept, time=time)
        self._entries.append(entry)
        self._bodies_bytes += len(kept)
        while len(self._entries) > self._requests_max or self._bodies_bytes > self._bodies_max_bytes:
            self._bodies_bytes -= len(self._entries.popleft().body)
        return entry

    def entries(self) -> tuple[Entry, ...]:
        """The requests kept, oldest first."""
        return tuple(self._entries)

    def clear(self) -> None:
        """Forget every request and count from zero."""
        self._entries.clear()
        self._bodies_bytes = self.total = 0
