"""Several stores asked in order: the first that has the key wins."""

from __future__ import annotations

from collections.abc import Sequence

from extproc.keys.record import KeyRecord, PresentedKey
from extproc.keys.store import ASK, Ask, KeyStore
from gateway.errors import StoreUnavailable
from gateway.telemetry import Logger


class Outages:
    """Which stores fail at present; logs only when that changes, not once a request."""

    def __init__(self, log: Logger) -> None:
        self._log = log
        self._failing: dict[str, str] = {}

    @property
    def failing(self) -> dict[str, str]:
        """Store name to its last error, for readiness."""
        return dict(self._failing)

    def failed(self, store: str, error: StoreUnavailable) -> None:
        """A store did not answer."""
        if store not in self._failing:
            self._log.error("key_store_down", store=store, error=str(error))
        self._failing[store] = str(error)

    def answered(self, store: str) -> None:
        """A store answered, with a record or without."""
        if self._failing and self._failing.pop(store, None) is not None:
            self._log.info("key_store_up", store=store)


class Chain:
    """Stores in order. A key is unknown only when every one of them said so."""

    def __init__(self, stores: Sequence[KeyStore], *, outages: Outages | None = None) -> None:
        self._stores = tuple(stores)
        self._outages = outages
        self.name = " → ".join(store.name for store in self._stores)

    def peek(self, key: PresentedKey) -> KeyRecord | Ask | None:
        """The first record known without waiting; ASK as soon as one store must be asked."""
        for store in self._stores:
            found = store.peek(key)
            if found is not None:
                return found
        return None

    async def find(self, key: PresentedKey) -> KeyRecord | None:
        """The first record found; a failing store is passed over, but never counts as a miss.

        Raises:
            StoreUnavailable: no store has the key and at least one did not answer.
        """
        outage: StoreUnavailable | None = None
        for store in self._stores:
            found = store.peek(key)
            if found is ASK:
                try:
                    found = await store.find(key)
                except StoreUnavailable as error:
                    outage = error
                    self._note(store.name, error)
                    continue
                self._note(store.name, None)
            if found is not None:
                return found
        if outage is not None:
            raise outage
        return None

    def _note(self, store: str, error: StoreUnavailable | None) -> None:
        if self._outages is None:
            return
        if error is None:
            self._outages.answered(store)
        else:
            self._outages.failed(store, error)
