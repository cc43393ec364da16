"""One type of resource on one stream: what the client wants, holds and has refused.

``has`` is updated when a response is sent, since a stream keeps its order; a NACK puts back what was there.
At most one response of a type is in flight.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from xds.messages import Nack
from xds.snapshot import Resource

OVERHEAD_BYTES: Final = 128
"""What a resource's type, version and lengths add to its body on the wire, about."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What the next response of a type has to say."""

    upserts: tuple[Resource, ...]
    removed: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class InFlight:
    """A response that is neither ACKed nor NACKed; ``before`` is what the client held of the names in it."""

    nonce: str
    version: str
    upserts: tuple[Resource, ...]
    before: Mapping[str, Resource | None]


class Subscription:
    """State of one type of resource on one stream."""

    __slots__ = (
        "_asked",
        "_due",
        "_left",
        "_rejected",
        "_unsure",
        "_view",
        "acked_version",
        "explicit",
        "has",
        "in_flight",
        "nack",
        "names",
        "nonce",
        "owed",
        "type_url",
        "wildcard",
    )

    def __init__(self, type_url: str) -> None:
        self.type_url = type_url
        self.wildcard = False
        self.explicit = False
        """Whether a name was ever subscribed to: ends the legacy meaning of an empty list."""
        self.names: set[str] = set()
        self.has: dict[str, Resource] = {}
        self.owed = False
        """A response is due even if there is nothing to say."""
        self.nonce = ""
        """Of the last response, whether answered or not."""
        self.in_flight: InFlight | None = None
        self.acked_version = ""
        self.nack: Nack | None = None
        self._asked: set[str] = set()
        self._unsure: set[str] = set()  # sent, but the client may hold another version or none
        self._rejected: dict[str, str] = {}  # version of each resource in refused responses
        self._due: dict[str, None] = {}  # names to compare with the view, in order
        self._view: Mapping[str, Resource] | None = None  # the last one reviewed
        self._left: set[str] = set()  # names that it lacked and the client may hold

    @property
    def settled(self) -> bool:
        """Whether the client has accepted everything it was sent."""
        return self.in_flight is None and self.nack is None

    def wants(self, name: str) -> bool:
        """Whether the client is subscribed to a name."""
        return self.wildcard or name in self.names

    def start(self, *, wildcard: bool, held: Iterable[Resource] = ()) -> None:
        """Begin with what the client says it holds, or begin to match everything."""
        self.has.update((resource.name, resource) for resource in held)
        self.wildcard = self.wildcard or wildcard
        self._view = None

    def ask(self, names: Iterable[str], *, known: bool = False) -> None:
        """Subscribe to names. They are sent even if unchanged, unless the client is ``known`` to hold them."""
        for name in names:
            self.names.add(name)
            self._demand(name, forget=not (known and name in self.has))

    def drop(self, names: Iterable[str]) -> None:
        """Unsubscribe from names. A wildcard may still match them, so then they are sent again."""
        for name in names:
            self.names.discard(name)
            if self.wildcard:
                self._demand(name, forget=True)
            else:
                self._forget(name)

    def drop_wildcard(self) -> None:
        """Unsubscribe from everything that was not subscribed to by name."""
        self.wildcard = False
        self._view = None
        for name in self.has.keys() - self.names:
            self._forget(name)

    def repeat(self, name: str) -> None:
        """Send a resource that the client holds once more: it waits for it."""
        if name in self.has:
            self._unsure.add(name)
            self._due[name] = None

    def review(self, view: Mapping[str, Resource]) -> None:
        """Compare everything with a view at the next :meth:`take`, removals first.

        A view seen before has nothing new; what it lacked and the client still holds is looked at again.
        """
        if self.nack and not self._rejected:
            self.nack = None
        if view is self._view:
            self._due.update(dict.fromkeys(sorted(self._left | self._asked | self._unsure)))
            return
        self._view = view
        held = self.has.keys() | self._rejected.keys() | self._unsure | self._asked
        self._left = held - view.keys()
        wanted = {*view, *self.names} if self.wildcard else self.names
        differing = {name for name in wanted if self.has.get(name) is not view.get(name)}
        again = (self._asked | self._unsure | self._rejected.keys()) & view.keys()
        self._due = dict.fromkeys([*sorted(self._left), *sorted(differing | again)])

    def take(
        self, view: Mapping[str, Resource], *, removes: bool, says_missing: bool, bytes_max: int | None
    ) -> Change | None:
        """What to send now, or None. Upserts beyond ``bytes_max`` wait for the next call.

        Args:
            removes: whether resources that the view lacks may be taken from the client.
            says_missing: whether a name that was asked for and is not in the view does not exist.
        """
        if self.in_flight or not (self._due or self.owed):
            return None
        self._reconsider(view)
        upserts: list[Resource] = []
        removed: list[str] = []
        size_bytes = 0
        for name in list(self._due):
            resource = view.get(name)
            if resource is None:
                if (says_missing and name in self._asked) or (removes and self._may_have(name)):
                    removed.append(name)
            elif self._lacks(resource):
                size_bytes += len(resource.body) + len(name) + OVERHEAD_BYTES
                if bytes_max is not None and upserts and size_bytes > bytes_max:
                    break
                upserts.append(resource)
            del self._due[name]
        if not (upserts or removed or self.owed):
            return None
        return Change(upserts=tuple(upserts), removed=tuple(removed))

    def applied(self, change: Change) -> dict[str, Resource | None]:
        """Note that a change goes to the client; gives what the client held of the names in it."""
        names = [*change.removed, *(resource.name for resource in change.upserts)]
        before = {name: self.has.get(name) for name in names}
        for name in change.removed:
            self._forget(name)
        for resource in change.upserts:
            self.has[resource.name] = resource
        self._asked -= before.keys()
        self._unsure -= before.keys()
        self.owed = False
        return before

    def sent(self, change: Change, *, nonce: str, version: str, before: Mapping[str, Resource | None]) -> None:
        """Note the response that carries a change."""
        self.nonce = nonce
        self.in_flight = InFlight(nonce=nonce, version=version, upserts=change.upserts, before=before)

    def ack(self) -> None:
        """The response in flight is in force."""
        if self.in_flight is None:
            return
        self.acked_version = self.in_flight.version
        self.in_flight = None
        if not self._rejected:
            self.nack = None

    def refuse(self, message: str) -> None:
        """The response in flight was refused: what was there before stays in force, as far as one can know."""
        if self.in_flight is None:
            return
        refused, self.in_flight = self.in_flight, None
        self.nack = Nack(type_url=self.type_url, version=refused.version, nonce=refused.nonce, message=message)
        for resource in refused.upserts:
            if self.has.get(resource.name) is not resource:
                continue  # unsubscribed since
            before = refused.before[resource.name]
            if before is None:
                del self.has[resource.name]
            else:
                self.has[resource.name] = before
            self._rejected[resource.name] = resource.version
        self._unsure.update(
            name for name, before in refused.before.items() if before is not None and name not in self.has
        )

    def _reconsider(self, view: Mapping[str, Resource]) -> None:
        """Envoy does not say which resource of a response was at fault: once one of them changed, all may go again."""
        if any(name not in view or view[name].version != version for name, version in self._rejected.items()):
            self._unsure.update(self._rejected)
            self._due.update(dict.fromkeys(self._rejected))
            self._rejected.clear()
            self.nack = None

    def _lacks(self, resource: Resource) -> bool:
        name = resource.name
        if not self.wants(name) or self._rejected.get(name) == resource.version:
            return False
        held = self.has.get(name)
        return held is None or held.version != resource.version or name in self._asked or name in self._unsure

    def _may_have(self, name: str) -> bool:
        return name in self.has or name in self._unsure or name in self._rejected

    def _demand(self, name: str, *, forget: bool) -> None:
        if forget:
            self._pardon(name)
            self._asked.add(name)
        self._due[name] = None

    def _forget(self, name: str) -> None:
        self.has.pop(name, None)
        self._pardon(name)
        self._unsure.discard(name)
        self._asked.discard(name)

    def _pardon(self, name: str) -> None:
        if self._rejected.pop(name, None) is not None and not self._rejected:
            self.nack = None
