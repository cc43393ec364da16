"""What a request is about, kept on its ledger entry: of it a usage record can be made if need be. Pure."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """One admitted request; what is not known is ''.

    ``endpoint`` is a value of ``gateway.endpoints.Kind``, ``policy`` the digest of the policy it was decided by,
    ``prices`` its candidates' as ``policies.price.written`` puts them. ``client_request_id`` is that of a call to
    /v1/inference, ``trace`` is ``<trace id>-<span id>``.
    """

    model: str = ""
    endpoint: str = ""
    policy: str = ""
    prices: str = ""
    client_request_id: str = ""
    trace: str = ""

    def written(self) -> str:
        """A JSON array of the fields in their order."""
        start = _start(self.model, self.endpoint, self.policy, self.prices)
        return f"{start}, {_text(self.client_request_id)}, {_text(self.trace)}]"


_NAMES: Final = tuple(field.name for field in fields(About))


def read(text: str) -> About:
    """What :meth:`About.written` has put down. Any other text is the name of a model, and all that is known."""
    if text.startswith("["):
        try:
            values = json.loads(text)
        except (ValueError, RecursionError):
            return About(model=text)
        if len(values) == len(_NAMES) and all(isinstance(value, str) for value in values):
            return About(**dict(zip(_NAMES, values, strict=True)))
    return About(model=text)


@lru_cache(maxsize=4096)
def _start(*values: str) -> str:
    """The part that requests of one model share, without the closing bracket."""
    return json.dumps(values)[:-1]


def _text(value: str) -> str:
    return json.dumps(value) if value else '""'
