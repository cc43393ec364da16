"""What a request that has ended has used, and what it is charged. Pure; docs/usage.md has the rule in words."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Literal

from gateway.endpoints import Kind
from limits.model import Settlement
from policies.price import cost_micro_usd, dearest
from usage.finished import Finished, TokenUsage, prices_of

BYTES_PER_TOKEN: Final = 4
"""Of an answer whose tokens nobody has counted."""
STREAM_BYTES_PER_TOKEN: Final = 200
"""Of such a stream: an event of OpenAI's format has about 230 bytes, and most have one token."""
_FAILED_FROM: Final = 400
CUT: Final = frozenset({"DC", "DR", "DPE", "UC", "UR", "UPE", "LR", "SI", "UMSDR", "DT"})
"""Flags of an answer that did not come to its end: the client left, or the backend, or it took too long."""
_NOTHING: Final = TokenUsage(tokens_input=0, tokens_output=0)

Source = Literal["provider", "tokenizer", "estimated", "partial"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Used:
    """Tokens and what they cost. ``source`` says who counted; None where there was nothing to count."""

    tokens: TokenUsage
    source: Source | None
    micro_usd: int


def used(finished: Finished) -> Used:
    """What a request has used.

    Raises:
        Malformed: its prices cannot be read.
    """
    tokens, source = _tokens(finished)
    tokens = tokens.within()
    prices = prices_of(finished.prices)
    # A backend that was no candidate at the admission, because the policy has changed since, costs no less.
    price = prices.get(finished.backend) or dearest(prices.values())
    micro_usd = cost_micro_usd(
        price,
        tokens_input=tokens.tokens_input,
        tokens_output=tokens.tokens_output,
        tokens_input_cached=tokens.tokens_input_cached,
        tokens_output_reasoning=tokens.tokens_output_reasoning,
    )
    return Used(tokens=tokens, source=source, micro_usd=micro_usd)


def _tokens(finished: Finished) -> tuple[TokenUsage, Source | None]:
    """What the backend has counted; without that nothing for a failure, and the best count there is for an answer."""
    if finished.reported is not None:
        counted = finished.counted
        if counted is None or finished.reported.tokens_input:
            return finished.reported, "provider"
        # A backend that tells of the answer alone: the question has been counted here.
        return replace(finished.reported, tokens_input=counted.tokens_input), "provider"
    if not finished.backend or not 0 < finished.status < _FAILED_FROM:
        return _NOTHING, None
    cut = not CUT.isdisjoint(finished.flags)
    if finished.counted is not None:
        # Of a stream that is left, what was counted may be some events behind what was sent.
        counted = replace(finished.counted, tokens_output=max(finished.counted.tokens_output, finished.events))
        return (counted, "partial") if cut else (finished.counted, "tokenizer")
    tokens_output = _sent(finished, cut=cut)
    # Nobody is charged more than was granted, but for what somebody has counted.
    sent = TokenUsage(
        tokens_input=finished.tokens_input, tokens_output=min(finished.tokens_output or tokens_output, tokens_output)
    )
    return sent, "partial" if cut or finished.events else "estimated"


def _sent(finished: Finished, *, cut: bool) -> int:
    """Output tokens of an answer that nobody has counted: events with text of a stream, else by its size."""
    if finished.endpoint == Kind.EMBEDDING.value:
        return 0
    # A stream of /v1/responses begins with events that have no text: left among them, it has sent nothing.
    if finished.events or (cut and finished.stream and finished.endpoint == Kind.RESPONSE.value):
        return finished.events
    return -(-finished.body_bytes // (STREAM_BYTES_PER_TOKEN if finished.stream else BYTES_PER_TOKEN))


def settlement_of(finished: Finished, use: Used) -> Settlement | None:
    """What closes the request's ledger entry; None when it left none open."""
    if not finished.admitted:
        return None
    return Settlement(
        request_id=finished.request_id,
        organization_id=finished.organization_id,
        tokens=use.tokens.tokens_input + use.tokens.tokens_output,
        micro_usd=use.micro_usd,
        admitted_s=(finished.admitted_ms or finished.started_us // 1000) // 1000,
        charge_to=finished.charge_to,
    )
