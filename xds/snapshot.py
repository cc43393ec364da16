"""Everything Envoy is told at one moment: immutable, checked, versioned by content.

A resource's version is a hash of its encoded bytes, so a rebuilt but equal resource is not sent again and a
restarted control plane agrees with a connected Envoy about what it already has.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from types import MappingProxyType
from typing import Final

LISTENER: Final = "type.googleapis.com/envoy.config.listener.v3.Listener"
ROUTE: Final = "type.googleapis.com/envoy.config.route.v3.RouteConfiguration"
SCOPED_ROUTE: Final = "type.googleapis.com/envoy.config.route.v3.ScopedRouteConfiguration"
CLUSTER: Final = "type.googleapis.com/envoy.config.cluster.v3.Cluster"
ENDPOINTS: Final = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"
SECRET: Final = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"  # noqa: S105 - a type

SHORT_NAMES: Final[Mapping[str, str]] = {
    LISTENER: "listener",
    ROUTE: "route",
    SCOPED_ROUTE: "scoped_route",
    CLUSTER: "cluster",
    ENDPOINTS: "endpoints",
    SECRET: "secret",
}
"""What logs, metrics and the admin API call a type; any other type is ``other``."""

Reference = tuple[str, str]
"""Type URL and name of a resource."""

_NOTHING: Final[Mapping[str, Resource]] = MappingProxyType({})


class SnapshotInconsistent(Exception):
    """Resources point at others that the snapshot lacks; ``problems`` has one line for each."""

    def __init__(self, problems: tuple[str, ...]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


@dataclass(frozen=True, slots=True, kw_only=True)
class Resource:
    """One named resource; ``body`` is the encoded message, the value of its google.protobuf.Any."""

    name: str
    version: str
    body: bytes = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Snapshot:
    """Resources by type URL and name, both sorted. Make one with :meth:`build`.

    ``version`` names the whole content, ``versions`` the content of each type.
    """

    version: str
    versions: Mapping[str, str]
    resources: Mapping[str, Mapping[str, Resource]] = field(repr=False)
    references: Mapping[Reference, frozenset[Reference]] = field(repr=False)

    @classmethod
    def build(
        cls,
        messages: Mapping[str, Mapping[str, bytes]],
        *,
        references: Mapping[Reference, frozenset[Reference]] | None = None,
        previous: Snapshot | None = None,
    ) -> Snapshot:
        """Snapshot of encoded messages by type URL and name.

        Args:
            references: what each resource points at, clusters of the bootstrap left out. A cluster's
                reference to its ClusterLoadAssignment also tells when endpoints must be sent again.
            previous: a snapshot whose unchanged resources are taken over without hashing them again.

        Raises:
            SnapshotInconsistent: a reference leads nowhere.
        """
        references = references or {}
        resources: dict[str, Mapping[str, Resource]] = {
            type_url: MappingProxyType(_resources(named, previous.of(type_url) if previous else _NOTHING))
            for type_url, named in sorted(messages.items())
        }
        problems = tuple(
            f"{_label(source)} refers to {_label(target)}, which does not exist"
            for source, targets in references.items()
            for target in sorted(targets)
            if target[1] not in resources.get(target[0], _NOTHING)
        )
        if problems:
            raise SnapshotInconsistent(problems)
        versions = {type_url: content_version(named.values()) for type_url, named in resources.items()}
        if previous is not None:  # an unchanged type is the same object, which sessions recognise
            same = [each for each in resources if previous.versions.get(each) == versions[each]]
            resources.update((each, previous.resources[each]) for each in same)
        return cls(
            version=_digest("\n".join(f"{type_url} {version}" for type_url, version in versions.items()).encode()),
            versions=MappingProxyType(versions),
            resources=MappingProxyType(resources),
            references=MappingProxyType(dict(references)),
        )

    def of(self, type_url: str) -> Mapping[str, Resource]:
        """Resources of one type by name; empty for a type the snapshot has none of."""
        return self.resources.get(type_url, _NOTHING)

    def version_of(self, type_url: str) -> str:
        """Version of all resources of one type together."""
        return self.versions.get(type_url) or content_version(())

    def referred(self, type_url: str, name: str, target_type_url: str) -> tuple[str, ...]:
        """Names of the given type that a resource points at, sorted."""
        targets = self.references.get((type_url, name), frozenset())
        return tuple(sorted(target for kind, target in targets if kind == target_type_url))


def content_version(resources: Iterable[Resource]) -> str:
    """Version of a set of resources, given in the order of their names."""
    return _digest("\n".join(f"{r.version} {r.name}" for r in resources).encode())


def short_name(type_url: str) -> str:
    """What logs, metrics and the admin API call a type."""
    return SHORT_NAMES.get(type_url, "other")


def _resources(messages: Mapping[str, bytes], previous: Mapping[str, Resource]) -> dict[str, Resource]:
    resources: dict[str, Resource] = {}
    for name in sorted(messages):
        body, before = messages[name], previous.get(name)
        unchanged = before is not None and before.body == body
        resources[name] = before if before and unchanged else Resource(name=name, version=_digest(body), body=body)
    return resources


def _digest(content: bytes) -> str:
    return sha256(content).hexdigest()[:16]


def _label(reference: Reference) -> str:
    return f"{short_name(reference[0])} {reference[1]!r}"
