"""What goes over an ADS stream, as far as a session reads or says it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from xds.snapshot import Resource


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaRequest:
    """What the session reads of a DeltaDiscoveryRequest. ``error_detail`` is None unless it is a NACK."""

    type_url: str
    subscribe: tuple[str, ...] = ()
    unsubscribe: tuple[str, ...] = ()
    initial_resource_versions: Mapping[str, str] | None = None
    response_nonce: str = ""
    error_detail: str | None = None
    node: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SotwRequest:
    """What the session reads of a DiscoveryRequest. ``error_detail`` is None unless it is a NACK."""

    type_url: str
    resource_names: tuple[str, ...] = ()
    version_info: str = ""
    response_nonce: str = ""
    error_detail: str | None = None
    node: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaResponse:
    """A DeltaDiscoveryResponse: what changed."""

    type_url: str
    resources: tuple[Resource, ...]
    removed: tuple[str, ...]
    nonce: str
    system_version: str

    @property
    def version(self) -> str:
        """What the response calls its content."""
        return self.system_version


@dataclass(frozen=True, slots=True, kw_only=True)
class SotwResponse:
    """A DiscoveryResponse; of a wildcard type it is all there is."""

    type_url: str
    resources: tuple[Resource, ...]
    nonce: str
    version_info: str

    @property
    def version(self) -> str:
        """What the response calls its content."""
        return self.version_info


@dataclass(frozen=True, slots=True, kw_only=True)
class TypeState:
    """How one type stands on a stream. Versions are empty until there is one."""

    type_url: str
    sent_version: str
    acked_version: str
    nack: Nack | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Nack:
    """A response that the client refused, with its reason."""

    type_url: str
    version: str
    nonce: str
    message: str
