"""Who runs what: every connected Envoy, what it accepted and what it refused. Times are arguments, in Unix seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from xds.messages import TypeState

Protocol = Literal["delta", "sotw"]
GONE_MAX: Final = 100
"""How many disconnected nodes are remembered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TypeStatus:
    """One type of resource at one node; versions are empty until there is one."""

    type_url: str
    sent_version: str = ""
    acked_version: str = ""
    rejected_version: str = ""
    message: str = ""
    """Why Envoy refused ``rejected_version``."""
    changed_at_s: float

    @property
    def lags(self) -> bool:
        """Whether something was sent and is not yet ACKed."""
        return self.sent_version != self.acked_version


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One stream, or the last one of a node that is gone."""

    id: str
    address: str
    protocol: Protocol
    connected: bool = True
    since_s: float
    """When it connected or, if gone, disconnected."""
    snapshot_version: str = ""
    """Snapshot that the node is led to."""
    converged: bool = False
    """Whether it has ACKed all of that snapshot."""
    types: tuple[TypeStatus, ...] = ()

    @property
    def rejected(self) -> tuple[str, ...]:
        """Type URLs of which the node refused the last version."""
        return tuple(each.type_url for each in self.types if each.rejected_version)

    @property
    def lagging(self) -> tuple[str, ...]:
        """Type URLs of which the node has not answered the last version."""
        return tuple(each.type_url for each in self.types if each.lags)


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetSummary:
    """Whether every connected node runs one snapshot; a fleet of none does not."""

    converged: bool
    connected: int
    behind: tuple[Node, ...] = field(default=())
    """Connected nodes that do not run it, each with what lags and what it refused."""


class Fleet:
    """The nodes by stream; disconnected ones stay visible until the node is back or others push them out."""

    def __init__(self) -> None:
        self._connected: dict[int, Node] = {}
        self._gone: dict[str, Node] = {}

    def connected(self, stream: int, *, node_id: str, address: str, protocol: Protocol, now_s: float) -> None:
        """A node has opened a stream."""
        self._gone.pop(node_id, None)
        self._connected[stream] = Node(id=node_id, address=address, protocol=protocol, since_s=now_s)

    def reported(
        self, stream: int, states: Sequence[TypeState], *, snapshot_version: str, converged: bool, now_s: float
    ) -> None:
        """A stream's session has moved."""
        node = self._connected[stream]
        before = {each.type_url: each for each in node.types}
        types = tuple(_status(state, before.get(state.type_url), now_s) for state in states)
        self._connected[stream] = replace(node, snapshot_version=snapshot_version, converged=converged, types=types)

    def disconnected(self, stream: int, *, now_s: float) -> None:
        """A stream has ended; one that never named its node leaves no trace."""
        node = self._connected.pop(stream, None)
        if node is None or any(each.id == node.id for each in self._connected.values()):
            return
        self._gone.pop(node.id, None)
        self._gone[node.id] = replace(node, connected=False, converged=False, since_s=now_s)
        while len(self._gone) > GONE_MAX:
            del self._gone[next(iter(self._gone))]

    @property
    def nodes(self) -> tuple[Node, ...]:
        """Connected nodes in the order they came, then those that are gone."""
        return (*self._connected.values(), *self._gone.values())

    def summary(self, snapshot_version: str) -> FleetSummary:
        """How far the connected nodes are with a snapshot."""
        nodes = tuple(self._connected.values())
        behind = tuple(each for each in nodes if not each.converged or each.snapshot_version != snapshot_version)
        return FleetSummary(converged=bool(nodes) and not behind, connected=len(nodes), behind=behind)


def _status(state: TypeState, before: TypeStatus | None, now_s: float) -> TypeStatus:
    status = TypeStatus(
        type_url=state.type_url,
        sent_version=state.sent_version,
        acked_version=state.acked_version,
        rejected_version=state.nack.version if state.nack else "",
        message=state.nack.message if state.nack else "",
        changed_at_s=before.changed_at_s if before else now_s,
    )
    return status if status == before else replace(status, changed_at_s=now_s)
