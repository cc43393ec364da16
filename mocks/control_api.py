"""The control paths of a mock backend, beside its endpoints on the same port.

====== =================== ==========================================================================
PUT    /__fault            put a fault in force: :class:`mocks.faults.Fault` as JSON
GET    /__fault            the kinds there are
DELETE /__fault            heal, /health included
POST   /__release          let the held requests go on
GET    /__requests         the journal, oldest first; ``?last=n``
PUT    /__requests         ``{"bodies": false}``: keep no bodies
DELETE /__requests         clear the journal
GET    /__requests/count   ``{"total", "open", "held", "health"}``
PUT    /__format           ``{"completions": "text" | "openai"}``
====== =================== ==========================================================================
"""

from __future__ import annotations

import json
from typing import Any, Final
from urllib.parse import parse_qs

from mocks.faults import FaultInvalid, FaultKind, parse_fault
from mocks.http1 import Exchange
from mocks.service import JSON_TYPE, Backend

PREFIX: Final = "/__"


async def handle(backend: Backend, exchange: Exchange) -> None:
    """Answer one request: the control paths here, every other by the backend."""
    if not exchange.target.startswith(PREFIX):
        await backend.handle(exchange)
        return
    try:
        status, body = _control(backend, exchange)
    except (FaultInvalid, ValueError) as error:
        status, body = 400, {"error": str(error)}
    await exchange.answer(status, [JSON_TYPE], json.dumps(body).encode())


def _control(backend: Backend, exchange: Exchange) -> tuple[int, Any]:
    path, _, query = exchange.target.partition("?")
    match exchange.method, path:
        case "PUT", "/__fault":
            backend.faults.set(parse_fault(json.loads(exchange.body)))
        case "GET", "/__fault":
            return 200, [kind.value for kind in FaultKind]
        case "DELETE", "/__fault":
            backend.faults.heal()
        case "POST", "/__release":
            backend.release()
        case "GET", "/__requests":
            entries = backend.journal.entries()
            last = int(parse_qs(query).get("last", [str(len(entries))])[0])
            return 200, [entry.as_json() for entry in entries[max(0, len(entries) - last) :]]
        case "PUT", "/__requests":
            backend.journal.keep_bodies = _choice(exchange.body, "bodies", (True, False))
        case "DELETE", "/__requests":
            backend.journal.clear()
            backend.counts.health = 0
        case "GET", "/__requests/count":
            counts = backend.counts
            numbers = {"open": counts.open, "held": counts.held, "health": counts.health}
            return 200, {"total": backend.journal.total} | numbers
        case "PUT", "/__format":
            backend.text_format = _choice(exchange.body, "completions", ("text", "openai")) == "text"
        case _:
            return 404, {"error": f"no {exchange.method} {path} here"}
    return 200, {"ok": True}


def _choice(body: bytes, name: str, choices: tuple[Any, ...]) -> Any:
    value = json.loads(body)
    if not isinstance(value, dict) or set(value) != {name} or value[name] not in choices:
        raise ValueError(f"want {{{name!r}: one of {choices}}}")
    return value[name]
