"""A mock backend's behaviour: OpenAI's endpoints under any path prefix, and its faults.

/health and the control paths (:mod:`mocks.control_api`) are not in the journal.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final

from mocks import answers, responses
from mocks.answers import Ask, Body
from mocks.faults import Fault, FaultInvalid, FaultKind, Faults, parse_fault_header
from mocks.http1 import Exchange
from mocks.journal import Entry, Journal

Plain = Callable[[Ask], Body]
Events = Callable[[Ask], Iterator[bytes]]

ENDPOINTS: Final[dict[str, tuple[Plain, Events | None]]] = {
    "/v1/chat/completions": (answers.chat, answers.chat_events),
    "/v1/completions": (answers.completion, answers.completion_events),
    "/v1/embeddings": (answers.embeddings, None),
    "/v1/responses": (responses.response, responses.response_events),
}
MODELS: Final = ("gpt-4o", "text-embedding-3-small")
FAULT_HEADER: Final = "x-mock-fault"
JSON_TYPE: Final = ("content-type", "application/json")
SSE_TYPE: Final = ("content-type", "text/event-stream; charset=utf-8")
WELL: Final = Fault(kind=FaultKind.SLOW)
"""The fault that is none."""


@dataclass(slots=True)
class Counts:
    """Numbers that a test waits for."""

    health: int = 0
    """Health checks answered."""
    open: int = 0
    """Requests being answered."""
    held: int = 0
    """Of these, waiting for a release."""


class Backend:
    """One mock backend."""

    def __init__(self, *, backend_id: str, faults: Faults, journal: Journal, text_format: bool = False) -> None:
        self.backend_id = backend_id
        self.faults = faults
        self.journal = journal
        self.text_format = text_format
        self.counts = Counts()
        self._release = asyncio.Event()

    def release(self) -> None:
        """Let every held request go on."""
        self._release.set()
        self._release = asyncio.Event()

    async def handle(self, exchange: Exchange) -> None:
        """Answer one request, or fail as told."""
        path = exchange.target.partition("?")[0]
        if path.endswith("/health"):
            await self._health(exchange)
            return
        entry = self.journal.add(
            method=exchange.method,
            path=exchange.target,
            headers=exchange.headers,
            body=exchange.body,
            time=time.time(),
        )
        self.counts.open += 1
        try:
            await self._fail_or_answer(exchange, entry, path)
        except FaultInvalid as error:
            await self._error(exchange, 400, f"{FAULT_HEADER}: {error}")
        finally:
            self.counts.open -= 1
            entry.answered = exchange.finished
            entry.disconnected = exchange.left and not exchange.finished

    async def _health(self, exchange: Exchange) -> None:
        self.counts.health += 1
        fault = self.faults.take_health()
        if fault and fault.delay_s and await exchange.left_within(fault.delay_s):
            return
        status = fault.status if fault else 200
        await self._json(
            exchange, status, {"status": "ok" if status == HTTPStatus.OK else "failing", "id": self.backend_id}
        )

    async def _fail_or_answer(self, exchange: Exchange, entry: Entry, path: str) -> None:
        asked = exchange.header(FAULT_HEADER)
        fault = self.faults.decide(parse_fault_header(asked)) if asked else self.faults.take()
        entry.fault = fault.kind.value if fault else None
        match fault.kind if fault else None:
            case FaultKind.HANG:
                await exchange.left_within(None)
            case FaultKind.RESET:
                exchange.reset()
            case FaultKind.CLOSE:
                exchange.drop()
            case FaultKind.STATUS:
                assert fault is not None  # noqa: S101  (says so to mypy)
                await self._status(exchange, fault)
            case _:
                await self._answer(exchange, entry, path, fault or WELL)

    async def _status(self, exchange: Exchange, fault: Fault) -> None:
        headers = [*self._marks(exchange), *fault.headers.items()]
        if not any(name.lower() == "content-type" for name in fault.headers):
            headers.append(JSON_TYPE)
        body = fault.body if fault.body is not None else _error_body(f"fault: status {fault.status}", "server_error")
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        if fault.delay_s and await exchange.left_within(fault.delay_s):
            return
        await exchange.answer(fault.status, headers, data)

    async def _answer(self, exchange: Exchange, entry: Entry, path: str, fault: Fault) -> None:
        if path.endswith("/v1/models") and exchange.method == "GET":
            models = [{"id": m, "object": "model", "created": 0, "owned_by": self.backend_id} for m in MODELS]
            await self._json(exchange, 200, {"object": "list", "data": models})
            return
        endpoint = next((e for suffix, e in ENDPOINTS.items() if path.endswith(suffix)), None)
        if endpoint is None or exchange.method != "POST":
            await self._error(exchange, 404, f"no {exchange.method} {path} here")
            return
        body = _parse(exchange.body)
        if body is None or not isinstance(body.get("model"), str):
            await self._error(exchange, 400, "the body is not a JSON object with a model")
            return
        ask = Ask(
            backend_id=self.backend_id,
            number=entry.number,
            created=int(entry.time),
            body=body,
            text_format=self.text_format,
        )
        if fault.delay_s and await exchange.left_within(fault.delay_s):
            return
        plain, events = endpoint
        if body.get("stream") is True and events is not None:
            await self._stream(exchange, events(ask), fault)
        else:
            await self._plain(exchange, plain(ask) | {"mock": {"backend": self.backend_id, "path": path}}, fault)

    async def _plain(self, exchange: Exchange, body: Body, fault: Fault) -> None:
        data = json.dumps(body).encode()
        if fault.kind is FaultKind.HUGE:
            data = json.dumps(body | {"padding": ""}).encode()
            data = data[:-2] + b"x" * (fault.bytes - len(data)) + data[-2:]
        if fault.kind is FaultKind.HOLD and await self._held(exchange):
            return
        headers = [*self._marks(exchange), JSON_TYPE]
        if fault.kind in {FaultKind.BAD_JSON, FaultKind.STREAM_CLEAN_CUT}:
            data = data[: len(data) // 2]
        if fault.kind is FaultKind.STREAM_CUT:
            exchange.start(200, [*headers, ("content-length", str(len(data)))])
            await exchange.send(data[: len(data) // 2])
            exchange.drop()
            return
        await exchange.answer(200, headers, data)

    async def _stream(self, exchange: Exchange, events: Iterator[bytes], fault: Fault) -> None:
        exchange.start(200, [*self._marks(exchange), SSE_TYPE, ("cache-control", "no-cache")])
        for index, event in enumerate(events):
            if index == fault.events:
                if fault.kind is FaultKind.STREAM_CUT:
                    exchange.drop()
                    return
                if fault.kind is FaultKind.STREAM_CLEAN_CUT:
                    break
                if fault.kind is FaultKind.HOLD and await self._held(exchange):
                    return
            if index and fault.event_delay_s and await exchange.left_within(fault.event_delay_s):
                return
            await exchange.send(_spoiled(event, fault, index))
            if exchange.left:
                return
        exchange.finish()

    async def _held(self, exchange: Exchange) -> bool:
        """Wait for a release; tells whether the client left first."""
        released: asyncio.Future[Any] = asyncio.ensure_future(self._release.wait())
        self.counts.held += 1
        try:
            await asyncio.wait([released, exchange.lost], return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.counts.held -= 1
            released.cancel()
        return exchange.left

    def _marks(self, exchange: Exchange) -> list[tuple[str, str]]:
        return [("x-mock-backend", self.backend_id), ("x-mock-path", exchange.target)]

    async def _json(self, exchange: Exchange, status: int, body: Any) -> None:
        await exchange.answer(status, [*self._marks(exchange), JSON_TYPE], json.dumps(body).encode())

    async def _error(self, exchange: Exchange, status: int, message: str) -> None:
        await self._json(exchange, status, _error_body(message, "invalid_request_error"))


def _spoiled(event: bytes, fault: Fault, index: int) -> bytes:
    """The event as the fault leaves it: a huge or a broken first one."""
    if fault.kind is FaultKind.HUGE and index == 0:
        return b": " + b"x" * max(0, fault.bytes - 3) + b"\n" + event
    if fault.kind is FaultKind.BAD_JSON and index == 0:
        return event[: len(event) // 2] + b"\n\n"
    return event


def _parse(body: bytes) -> Body | None:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _error_body(message: str, kind: str) -> Body:
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}
