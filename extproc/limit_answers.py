"""What a decision of the limit store means to a client: response headers, refusals, their figures. Pure.

Source: contract, "Response headers" and "Errors".
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from extproc.budget_service import BudgetAnswer
from gateway import names
from gateway.errors import LimitContext, Reason, Refused
from limits.context import context_of
from limits.model import Admission, Admitted, Claimed, Denied, Figure, LimitKind, StoredAnswer

RUNNING_RETRY_MS: Final = 500
"""When to ask again for an answer that is still being made."""
_REASONS: Final = {
    LimitKind.REQUESTS: Reason.REQUEST_RATE,
    LimitKind.TOKENS: Reason.TOKEN_RATE,
    LimitKind.PARALLEL: Reason.PARALLEL_REQUESTS,
    LimitKind.DAILY_MICRO_USD: Reason.BUDGET_SPENT,
    LimitKind.DAILY_TOKENS: Reason.QUOTA_SPENT,
    LimitKind.MONTHLY_MICRO_USD: Reason.BUDGET_SPENT,
    LimitKind.MONTHLY_TOKENS: Reason.QUOTA_SPENT,
}
_TOKEN_QUOTAS: Final = frozenset({"TOKEN", "TOKENS"})
_CLAIMS: Final = {"mismatch": Reason.IDEMPOTENCY_MISMATCH, "too_large": Reason.ANSWER_NOT_KEPT}

Headers = tuple[tuple[str, str], ...]

_LIMIT_REQUESTS, _REMAINING_REQUESTS, _RESET_REQUESTS, _LIMIT_TOKENS, _REMAINING_TOKENS, _RESET_TOKENS = (
    names.RATE_LIMIT_HEADERS
)


class LimitRefused(Refused):
    """Refused by a limit; ``figures`` are of every limit that was consulted."""

    def __init__(self, reason: Reason, text: str, *, denied: Denied, limit: LimitContext, **said: Any) -> None:
        super().__init__(reason, text, limit=limit, headers=rate_headers(denied.figures), **said)
        self.figures = denied.figures


def duration(ms: int) -> str:
    """``250ms``, ``30s``, ``2m30s`` or ``1h0m5s``; from a second on rounded up to whole ones."""
    if ms < 1000:  # noqa: PLR2004
        return f"{ms}ms"
    minutes, seconds = divmod(-(-ms // 1000), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes}m{seconds}s"
    return f"{minutes}m{seconds}s" if minutes else f"{seconds}s"


def rate_headers(figures: Iterable[Figure]) -> Headers:
    """``x-ratelimit-*`` of the bucket that has the least left; none where nothing is limited."""
    requests: Figure | None = None
    tokens: Figure | None = None
    for figure in figures:
        if figure.kind is LimitKind.REQUESTS:
            if requests is None or figure.remaining < requests.remaining:
                requests = figure
        elif figure.kind is LimitKind.TOKENS and (tokens is None or figure.remaining < tokens.remaining):
            tokens = figure
    headers: Headers = ()
    if requests is not None:
        headers = (
            (_LIMIT_REQUESTS, str(requests.limit)),
            (_REMAINING_REQUESTS, str(requests.remaining)),
            (_RESET_REQUESTS, duration(requests.reset_ms)),
        )
    if tokens is not None:
        headers += (
            (_LIMIT_TOKENS, str(tokens.limit)),
            (_REMAINING_TOKENS, str(tokens.remaining)),
            (_RESET_TOKENS, duration(tokens.reset_ms)),
        )
    return headers


def _usd(amount: float) -> str:
    """``$500`` or ``$0.000123``: to the micro-dollar, without zeros at the end."""
    return f"${amount:,.6f}".rstrip("0").rstrip(".")


def refused_by(denied: Denied) -> LimitRefused:
    """The refusal of a request that a limit denies."""
    figure = denied.denier
    context = context_of(figure, at_ms=denied.at_ms)
    whose = "organisation's" if context.subject == "organization" else "API key's"
    reason = _REASONS[figure.kind]
    if context.period:
        left = max(0, context.remaining)  # it may be overspent, which is nobody's business here
        amounts = (
            f"{_usd(context.limit)}, of which {_usd(left)} remain"
            if context.unit == "usd"
            else f"{context.limit:,} {context.unit}, of which {left:,} remain"
        )
        text = (
            f"The {whose} {context.period.lower()} budget is {amounts}; this request may need more. "
            f"It begins anew at {context.reset_at}."
        )
        return LimitRefused(reason, text, denied=denied, limit=context)
    assert denied.wait_ms is not None  # noqa: S101 - only budgets cannot be waited for
    if figure.kind is LimitKind.PARALLEL:
        text = f"The {whose} limit of {figure.limit:,} requests at once is reached; try again when one of them ends."
    else:
        unit, window = context.unit, "burst" if figure.kind is LimitKind.REQUESTS else "minute"
        wait = duration(denied.wait_ms)
        text = f"The {whose} limit of {figure.limit:,} {unit} a {window} is reached; try again in {wait}."
    return LimitRefused(reason, text, denied=denied, limit=context, retry_after_ms=denied.wait_ms)


def refused_for(claimed: Claimed) -> Refused:
    """The refusal of a request whose idempotency key is taken; not for one whose answer is kept."""
    if claimed.state == "running":
        return Refused(Reason.IN_PROGRESS, retry_after_ms=RUNNING_RETRY_MS)
    return Refused(_CLAIMS[claimed.state])


def admitted_or_refused(admission: Admission) -> Admitted | StoredAnswer:
    """The admission, or the answer kept for its idempotency key.

    Raises:
        Refused: a limit or an idempotency key is in the way.
    """
    match admission:
        case Admitted():
            return admission
        case Denied():
            raise refused_by(admission)
        case Claimed():
            if admission.answer is None:
                raise refused_for(admission)
            return admission.answer


def refused_by_service(answer: BudgetAnswer) -> Refused:
    """The refusal of a request whose organisation the budget service allows nothing more."""
    tokens = answer.quota_type.upper() in _TOKEN_QUOTAS
    reason = Reason.QUOTA_SPENT if tokens else Reason.BUDGET_SPENT
    text = "The organisation's budget allows no more requests."
    if answer.current_usage is not None and answer.limit is not None:
        text = f"The organisation's budget is used up: {answer.current_usage:,} of {answer.limit:,}."
    return Refused(reason, text)
