"""A bounded cache before a slow store, with at most one lookup of a key at a time.

Keys that exist and keys that do not are kept apart, so a flood of made-up keys cannot push out real ones.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from extproc.keys.record import KeyRecord, PresentedKey
from extproc.keys.store import ASK, Ask, KeyStore
from extproc.shared_calls import SharedCalls

LOOKUPS_MAX: Final = 1024


class _Shelf:
    """Answers by digest until their time; the least recently used goes first when it is full."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._entries: OrderedDict[str, tuple[KeyRecord | None, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, digest: str, now: float) -> KeyRecord | Ask | None:
        entry = self._entries.get(digest)
        if entry is None:
            return ASK
        if entry[1] <= now:
            del self._entries[digest]
            return ASK
        self._entries.move_to_end(digest)
        return entry[0]

    def put(self, digest: str, record: KeyRecord | None, until: float) -> None:
        self._entries[digest] = (record, until)
        self._entries.move_to_end(digest)
        if len(self._entries) > self._size:
            self._entries.popitem(last=False)

    def drop(self, digest: str) -> None:
        self._entries.pop(digest, None)

    def clear(self) -> None:
        self._entries.clear()


class Cached:
    """Answers of ``store``: usable records for ``ttl_s``, misses and unusable records for ``negative_ttl_s``.

    An outage is never cached, and never shortens what is. ``size`` bounds usable and other answers each.
    ``clock`` is monotonic and ``wall`` unix seconds: no record is kept beyond its ``expires_at``.
    """

    def __init__(
        self,
        store: KeyStore,
        *,
        ttl_s: float,
        negative_ttl_s: float,
        size: int,
        clock: Callable[[], float],
        wall: Callable[[], float],
    ) -> None:
        self.name = store.name
        self._store = store
        self._ttl_s = ttl_s
        self._negative_ttl_s = negative_ttl_s
        self._clock = clock
        self._wall = wall
        self._usable = _Shelf(size)
        self._unusable = _Shelf(size)
        self._lookups: SharedCalls[str, KeyRecord | None] = SharedCalls(store.name, most=LOOKUPS_MAX)

    def __len__(self) -> int:
        return len(self._usable) + len(self._unusable)

    def peek(self, key: PresentedKey) -> KeyRecord | Ask | None:
        """The cached answer, or ASK."""
        now = self._clock()
        found = self._usable.get(key.digest, now)
        return self._unusable.get(key.digest, now) if found is ASK else found

    async def find(self, key: PresentedKey) -> KeyRecord | None:
        """The cached answer, or the store's, shared by all who ask for this key meanwhile.

        Raises:
            StoreUnavailable: the store did not answer, or too many lookups are running.
        """
        found = self.peek(key)
        if found is not ASK:
            return found
        return await self._lookups.share(key.digest, lambda: self._look_up(key))

    def invalidate(self, digest: str | None) -> None:
        """Forget one key, or with None every key. A lookup under way is not cached: it may have read the old state."""
        if digest is None:
            self._usable.clear()
            self._unusable.clear()
        else:
            self._usable.drop(digest)
            self._unusable.drop(digest)
        self._lookups.forget(digest)

    async def close(self) -> None:
        """Cancel the lookups under way; their callers get StoreUnavailable."""
        await self._lookups.close()

    async def _look_up(self, key: PresentedKey) -> KeyRecord | None:
        record = await self._store.find(key)
        if self._lookups.is_current(key.digest):
            self._keep(key.digest, record)
        return record

    def _keep(self, digest: str, record: KeyRecord | None) -> None:
        ttl_s = 0.0
        if record is not None and record.status == "active":
            ttl_s = self._ttl_s
            if record.expires_at is not None:
                ttl_s = min(ttl_s, record.expires_at - self._wall())
        shelf = self._usable if ttl_s > 0 else self._unusable
        shelf.put(digest, record, self._clock() + (ttl_s if ttl_s > 0 else self._negative_ttl_s))
