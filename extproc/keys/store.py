"""The seam between authentication and wherever keys are kept."""

from __future__ import annotations

from enum import Enum
from typing import Final, Protocol

from extproc.keys.record import KeyRecord, PresentedKey


class Ask(Enum):
    """``peek`` cannot tell: ``find`` must be awaited."""

    ASK = "ask"


ASK: Final = Ask.ASK


class KeyStore(Protocol):
    """Finds the record of a key. One store serves many concurrent requests of one event loop."""

    @property
    def name(self) -> str:
        """What messages and readiness call this store."""
        ...

    def peek(self, key: PresentedKey, /) -> KeyRecord | Ask | None:
        """What is known without waiting: the record, None for a key that does not exist, or ``ASK``."""
        ...

    async def find(self, key: PresentedKey, /) -> KeyRecord | None:
        """The record, or None for a key that does not exist.

        Raises:
            StoreUnavailable: the store did not give a usable answer in time.
        """
        ...
