"""A budget service that answers as it is told."""

from __future__ import annotations

from collections import Counter
from typing import Any
from urllib.parse import unquote

from tests.harness.service import LocalService


class Budgets(LocalService):
    """Allows every organisation that it was not told about. ``asked`` counts by organisation; ``paths`` are as sent."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: Counter[str] = Counter()
        self.paths: list[tuple[str, str]] = []
        self._said: dict[str, tuple[int, Any]] = {}

    def says(self, organization: str, body: Any, *, status: int = 200) -> None:
        """Make it answer so of an organisation; bytes are sent as they are."""
        self._said[organization] = (status, body)

    def denies(self, organization: str, **fields: Any) -> None:
        """Make it allow an organisation nothing."""
        self.says(organization, {"allowed": False, **fields})

    def answer(self, method: str, path: str, asked: Any) -> tuple[int, Any]:
        """The answer, if it is asked as the contract says."""
        self.paths.append((method, path))
        parts = path.split("/")
        if method != "GET" or len(parts) != 5 or parts[:3] != ["", "v1", "budgets"] or parts[4] != "check":
            return 404, {}
        organization = unquote(parts[3])
        self.asked[organization] += 1
        return self._said.get(organization, (200, {"allowed": True}))
