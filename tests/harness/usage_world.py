"""A router whose every request has a record: endpoints, models for every way of ending, and who asks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.harness.calls import CHAT, COMPLETIONS, EMBEDDINGS, INFERENCE, chat, inference
from tests.harness.stack import Stack, model_of, policy_of, running_stack
from tests.harness.usage import Record, Records

RESPONSES = "/v1/responses"
PRICES = {"a": (5000, 15_000), "b": (7000, 21_001)}
"""Micro-dollars per 1,000 tokens of input and output."""
TEXT_AFTER = 4
"""Events of /v1/responses before the first with text."""


def a_policy(stack: Stack) -> dict[str, Any]:
    """``pair`` fails over from ``a`` to ``b``, ``solo`` is ``a`` alone; ``quiet`` and ``dear`` have such backends."""
    models = [
        model_of({"a": 1, "b": 0}, model="pair"),
        model_of({"a": 1}, model="solo"),
        model_of({"silent": 1}, model="quiet"),
        model_of({"dear": 1}, model="dear"),
        model_of({"a": 1}, model="private", lists={"a": {"allow_list": ["nobody"]}}),
    ]
    prices = {
        backend: {"input_usd_per_1k": i / 1e6, "output_usd_per_1k": o / 1e6} for backend, (i, o) in PRICES.items()
    }
    return policy_of(
        {**stack.uris, "silent": stack.uris["a"], "dear": stack.uris["a"]},
        models=[{**model, "max_output_tokens": 1000} for model in models],
        backend_of={
            **{backend: {"price": price} for backend, price in prices.items()},
            "silent": {"price": prices["a"], "reports_usage": False},
            "dear": {"price": {"input_usd_per_1k": 1, "output_usd_per_1k": 1}},
        },
        limits={
            "default": {"requests_per_second": 1000, "burst": 2000, "budgets": [{"period": "MONTHLY", "usd": 1000}]},
            "organizations": {
                "hasty": {"requests_per_second": 1, "burst": 1},
                "poor": {"budgets": [{"period": "DAILY", "usd": 0.0005}]},
            },
        },
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One of the endpoints, streamed or not."""

    path: str
    stream: bool

    def body(self, model: str, **fields: Any) -> dict[str, Any]:
        """A call that states only what matters."""
        if self.stream:
            fields["stream"] = True
        match self.path:
            case "/v1/inference":
                return inference(model, metadata={"team": "search"}, **fields)
            case "/v1/chat/completions":
                return chat(model, **fields)
            case "/v1/completions":
                return {"model": model, "prompt": "hi", **fields}
            case _:
                return {"model": model, "input": "hi", **fields}

    @property
    def endpoint(self) -> str:
        """Its name in a record."""
        names = {INFERENCE: "inference", CHAT: "chat", COMPLETIONS: "completion", EMBEDDINGS: "embedding"}
        return names.get(self.path, "response")

    @property
    def events_before_text(self) -> int:
        """How many events of a stream come before the first with text."""
        return TEXT_AFTER if self.path == RESPONSES else 0

    @property
    def tokens_output(self) -> int:
        """Words of the mock backend's answer."""
        return 0 if self.path == EMBEDDINGS else 5


ASKS = [
    Ask(path=path, stream=stream)
    for path in (INFERENCE, CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES)
    for stream in (False, True)
    if not (stream and path in {INFERENCE, EMBEDDINGS})
]
STREAMS = [ask for ask in ASKS if ask.stream]


def name_of(ask: Ask) -> str:
    """Its name in a test's id."""
    return f"{ask.endpoint}, stream" if ask.stream else ask.endpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """A running router, and what its ledger has handed on."""

    stack: Stack
    records: Records
    clients: dict[str, httpx.Client] = field(default_factory=dict)

    def client(self, org: str = "acme") -> httpx.Client:
        """A client with a key of an organisation; made once, because making one takes as long as a request."""
        if org not in self.clients:
            self.clients[org] = self.stack.client(f"dev-{org}-alice")
        return self.clients[org]

    def send(self, ask: Ask, model: str = "pair", *, org: str = "acme", fault: str = "", **fields: Any) -> Record:
        """One request, and its one record."""
        return self.records.of(self.answer(ask, model, org=org, fault=fault, **fields))

    def answer(
        self, ask: Ask, model: str = "pair", *, org: str = "acme", fault: str = "", **fields: Any
    ) -> httpx.Response:
        """One request read to its end, which may come too soon."""
        headers = {"x-mock-fault": fault} if fault else {}
        body = ask.body(model, **fields)
        with self.client(org).stream("POST", ask.path, json=body, headers=headers) as response:
            try:
                response.read()
            except httpx.TransportError:
                assert fault
        return response

    def leave(self, ask: Ask, events: int) -> str:
        """Read so many events with text of a stream, then go; the request's id."""
        sent = ask.events_before_text + events
        headers = {"x-mock-fault": f"hold={sent}"}
        body = ask.body("solo", mock_events=20)
        with self.client().stream("POST", ask.path, json=body, headers=headers) as response:
            got = ""
            chunks = response.iter_text()
            while got.count("\n\n") < sent:
                got += next(chunks)
        return str(response.headers["x-request-id"])


@contextmanager
def running_world() -> Iterator[World]:
    """The router and its ledger."""
    with running_stack(valkey=True, workers=1, environ={"LIMIT_STORE_DEADLINE_S": "5"}) as stack:
        stack.apply(a_policy(stack))
        running = World(stack=stack, records=Records(stack))
        yield running
        for client in running.clients.values():
            client.close()


def cost_of(record: Mapping[str, Any]) -> int:
    """What a record's tokens cost, rounded up once."""
    price_input, price_output = PRICES.get(record["backend_id"], PRICES["a"])
    return -(-(record["tokens_input"] * price_input + record["tokens_output"] * price_output) // 1000)
