"""Commands to the limit store other than the one that admits, as bytes, and their replies as values. Pure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final, Literal

from limits.admission import AMOUNT_MAX
from limits.model import Closing, Credit, Opened, Settlement, StoredAnswer
from limits.msgpack import encode
from limits.resp import pack
from limits.scripts import EXTEND, FINISH, OPENED, RESET, SETTLE, prefix
from policies.model import KeyId, OrganizationId

SLOT_KEPT_MS: Final = 300_000
"""A slot of a request that is not heard of is not kept for longer; admit.lua has the same."""
_OUTCOMES: Final[dict[bytes, Literal["settled", "expired", "charged", "repeated", "none"]]] = {
    b"SETTLED": "settled",
    b"EXPIRED": "expired",
    b"CHARGED": "charged",
    b"REPEATED": "repeated",
    b"NONE": "none",
}


def settle_command(settlement: Settlement, *, mode: Literal[b"settle", b"expire"] = b"settle") -> bytes:
    """EVALSHA of settle.lua."""
    start = prefix(settlement.organization_id)
    return pack(
        b"EVALSHA",
        SETTLE.sha,
        b"1",
        start + b"open",
        start,
        mode,
        settlement.request_id.encode(),
        encode(min(settlement.tokens, AMOUNT_MAX), min(settlement.micro_usd, AMOUNT_MAX), settlement.admitted_s),
        settlement.charge_to.encode(),
    )


def expire_command(organization_id: OrganizationId, request_id: str) -> bytes:
    """EVALSHA of settle.lua for an overdue entry."""
    nothing = Settlement(request_id=request_id, organization_id=organization_id, tokens=0, micro_usd=0)
    return settle_command(nothing, mode=b"expire")


def opened_command(organization_id: OrganizationId, request_id: str) -> bytes:
    """EVALSHA of opened.lua."""
    start = prefix(organization_id)
    return pack(b"EVALSHA", OPENED.sha, b"1", start + b"open", start, request_id.encode())


def read_opened(reply: Sequence[Any], organization_id: OrganizationId, request_id: str) -> Opened | None:
    """What opened.lua answered."""
    if not reply:
        return None
    admitted_ms, tokens_input, tokens_output, micro_usd, key_id, about = reply
    return Opened(
        request_id=request_id,
        organization_id=organization_id,
        key_id=KeyId(key_id.decode()),
        admitted_ms=admitted_ms,
        tokens_input=tokens_input,
        tokens_output=tokens_output,
        micro_usd=micro_usd,
        about=about.decode(),
    )


def extend_command(organization_id: OrganizationId, request_id: str, *, overdue_ms: int) -> bytes:
    """EVALSHA of extend.lua."""
    start = prefix(organization_id)
    numbers = encode(overdue_ms, SLOT_KEPT_MS)
    return pack(b"EVALSHA", EXTEND.sha, b"1", start + b"open", start, request_id.encode(), numbers)


def read_closing(reply: Sequence[Any]) -> Closing:
    """What settle.lua answered."""
    return Closing(outcome=_OUTCOMES[reply[0]], tokens=reply[1], micro_usd=reply[2])


def finish_command(
    organization_id: OrganizationId,
    request_id: str,
    claim_key: str,
    answer: StoredAnswer | Literal["too_large"] | None,
    *,
    kept_ms: int,
) -> bytes:
    """EVALSHA of finish.lua: keep an answer, remember that it was too large to keep, or with None let the key go."""
    start = prefix(organization_id)
    head = (b"EVALSHA", FINISH.sha, b"1", start + b"open", start, request_id.encode(), claim_key.encode())
    if answer is None:
        return pack(*head, b"0", b"", b"", b"")
    if answer == "too_large":
        return pack(*head, b"-1", b"%d" % kept_ms, b"", b"")
    headers = json.dumps(answer.headers, separators=(",", ":")).encode()
    return pack(*head, b"%d" % kept_ms, b"%d" % answer.status, headers, answer.body)


def reset_command(organization_id: OrganizationId, subjects: Sequence[str]) -> bytes:
    """EVALSHA of reset.lua."""
    start = prefix(organization_id)
    return pack(b"EVALSHA", RESET.sha, b"1", start + b"open", start, *(subject.encode() for subject in subjects))


def read_credits(reply: Sequence[Any]) -> tuple[Credit, ...]:
    """What reset.lua answered."""
    return tuple(
        Credit(period=reply[at].decode(), tokens=reply[at + 1], micro_usd=reply[at + 2])
        for at in range(0, len(reply), 3)
    )
