"""What a request that has ended is charged. Pure; docs/limits.md has the rule in words."""

from __future__ import annotations

from typing import Final

from limits.model import Settlement
from policies.price import cost_micro_usd, dearest
from usage.access_log import Finished, TokenUsage

BYTES_PER_TOKEN: Final = 4
"""Of an answer whose tokens nobody has counted."""
STREAM_BYTES_PER_TOKEN: Final = 200
"""Of such a stream: an event of OpenAI's format has about 230 bytes, and most have one token."""
_FAILED_FROM: Final = 400
_NOTHING: Final = TokenUsage(tokens_input=0, tokens_output=0, tokens_input_cached=0)


def settlement_of(finished: Finished) -> Settlement | None:
    """What closes the request's ledger entry; None when it left none open."""
    if finished.closed:
        return None
    used = _used(finished)
    return Settlement(
        request_id=finished.request_id,
        organization_id=finished.organization_id,
        tokens=used.tokens_input + used.tokens_output,
        micro_usd=cost_micro_usd(
            # A backend that was no candidate at the admission, because the policy has changed since, costs no less.
            finished.prices.get(finished.backend) or dearest(finished.prices.values()),
            tokens_input=used.tokens_input,
            tokens_output=used.tokens_output,
            tokens_input_cached=used.tokens_input_cached,
        ),
        admitted_s=finished.started_s,
        charge_to=finished.charge_to,
    )


def _used(finished: Finished) -> TokenUsage:
    """What the backend has counted; without that nothing for a failure, and an estimate for an answer.

    An answer without usage is that of a backend which reports none, or one that the client did not wait for.
    """
    if finished.usage is not None:
        return finished.usage
    if not finished.backend or not 0 < finished.status < _FAILED_FROM:
        return _NOTHING
    sent = -(-finished.body_bytes // (STREAM_BYTES_PER_TOKEN if finished.stream else BYTES_PER_TOKEN))
    return TokenUsage(
        tokens_input=finished.tokens_input, tokens_output=min(finished.tokens_output, sent), tokens_input_cached=0
    )
