"""An answer on its way back, where ext_proc sees it: translated, counted, kept for its idempotency key.

Envoy sends answers of /v1/inference whole, those to an idempotency key as they come, and of others the headers where
some backend reports no usage; their bodies only where they are wanted (``xds/resources/routes.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from extproc.answer_text import texts_of_answer
from extproc.answer_usage import Usage, reported
from extproc.counting import CountedJson, CountedStream, Counting
from extproc.exchange import Command, Continue, Counts, Reply, ResponseBody, ResponseHeaders, Rewrite
from extproc.policy import Costs
from extproc.recording import Recording
from extproc.tokens import TokenCounter
from extproc.translate import Trace, answer, failure, is_answer, parsed
from extproc.validate import Ask, Inference
from gateway import names
from gateway.endpoints import Kind
from gateway.telemetry import Logger
from policies.model import BackendId


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """What is known of a request that has been forwarded.

    ``silent`` backends report no usage, and none does where ``tells_usage`` is false. ``tokens_input`` None: nobody has
    counted. ``started_s`` is unix seconds.
    """

    ask: Ask
    costs: Costs
    silent: frozenset[BackendId]
    tells_usage: bool
    tokens_input: int | None
    started_s: float
    trace: Trace


class Answering:
    """The answer to one request."""

    __slots__ = ("_clock_s", "_counting", "_log", "_recording", "_sent", "_tokens")

    def __init__(
        self, sent: Sent, recording: Recording, *, tokens: TokenCounter, clock_s: Callable[[], float], log: Logger
    ) -> None:
        self._sent = sent
        self._recording = recording
        self._tokens = tokens
        self._clock_s = clock_s
        self._log = log
        self._counting: Counting | None = None

    async def on_headers(self, event: ResponseHeaders) -> Command:
        """The answer begins."""
        self._recording.headers = event.headers
        if event.ends:
            command = await self.on_body(ResponseBody(body=b""))
            if not isinstance(command, Rewrite):
                return command
            # There is no body whose replacement could carry the answer: it has to be a reply of ours.
            return Reply(status=command.status or self._status(), body=command.body)
        if self._sent.ask.inference is not None or not self._is_to_be_counted():
            return Continue()
        if self._sent.ask.kind is Kind.EMBEDDING:
            return Continue(counted=await self._counts(0))
        is_stream = self._content_type().startswith("text/event-stream")
        self._counting = (CountedStream if is_stream else CountedJson)(self._sent.ask.model, self._tokens)
        return Continue(body_wanted=True)

    def _is_to_be_counted(self) -> bool:
        backend = self._recording.headers.get(names.HEADER_ROUTING_BACKEND)
        return (
            (not self._sent.tells_usage or backend in self._sent.silent)
            and 200 <= self._status() < 300  # noqa: PLR2004
            and self._content_type().startswith(("application/json", "text/event-stream"))
        )

    async def on_body(self, event: ResponseBody) -> Command:
        """The answer, or its next part."""
        command: Command
        inference = self._sent.ask.inference
        if inference is not None:
            command = await self._translated(inference, event.body)
            body, status = command.body, command.status or self._status()
        else:
            command = Continue(counted=await self._counted(event))
            body, status = event.body, self._status()
        self._recording.add(body)
        if event.ends:
            await self._recording.keep(status=status, log=self._log)
        return command

    async def _counted(self, event: ResponseBody) -> Counts:
        """What there is to be told of the answer's tokens after this part."""
        if self._counting is None:
            return ()
        await self._counting.add(event.body)
        tokens_output = await (self._counting.total() if event.ends else self._counting.progress())
        return () if tokens_output is None else await self._counts(tokens_output)

    async def _counts(self, tokens_output: int) -> Counts:
        tokens_input = await self._input()
        return (
            (names.METADATA_TOKENS_INPUT, str(tokens_input)),
            (names.METADATA_TOKENS_OUTPUT, str(tokens_output)),
        )

    async def _input(self) -> int:
        if self._sent.tokens_input is None:
            self._sent = replace(self._sent, tokens_input=await self._tokens.count_input(self._sent.ask))
        assert self._sent.tokens_input is not None  # noqa: S101 - it has just been counted
        return self._sent.tokens_input

    async def _translated(self, inference: Inference, body: bytes) -> Rewrite:
        sent, status, output = self._sent, self._status(), parsed(body)
        if not is_answer(status, output):
            return failure(status, output, sent.trace)
        used, counted = reported(output), False
        if used is None:
            tokens_output = await self._tokens.count_output(sent.ask.model, tuple(texts_of_answer(output)))
            used, counted = Usage(tokens_input=await self._input(), tokens_output=tokens_output), True
        elif not used.tokens_input:  # the backend has told of the answer alone
            used, counted = replace(used, tokens_input=await self._input()), True
        backend = self._recording.headers.get(names.HEADER_ROUTING_BACKEND, "")
        command = answer(
            output,
            used=used,
            request_id=inference.request_id,
            latency_ms=round((self._clock_s() - sent.started_s) * 1000),
            # One that was no candidate, because Envoy had another policy, costs what the ledger takes for it.
            price=sent.costs.prices.get(backend, sent.costs.dearest),
            trace=sent.trace,
        )
        return replace(command, counted=await self._counts(used.tokens_output)) if counted else command

    def _content_type(self) -> str:
        return self._recording.headers.get("content-type", "").lower()

    def _status(self) -> int:
        return int(self._recording.headers.get(":status", "502"))

    @property
    def waited_for(self) -> bool:
        """Whether somebody may wait for this answer by its idempotency key."""
        return self._recording.holds_claim

    async def end(self) -> None:
        """The exchange is over before the answer was complete: the next request with its key is the first again."""
        await self._recording.let_go(self._log)
