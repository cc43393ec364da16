"""Endpoints of clusters."""

from __future__ import annotations

from ipaddress import ip_address

from envoy_data_plane.envoy.config.core.v3 import Address
from envoy_data_plane.envoy.config.endpoint.v3 import (
    ClusterLoadAssignment,
    Endpoint,
    LbEndpoint,
    LocalityLbEndpoints,
)

from gateway import names
from policies.model import Backend
from xds.resources.encode import socket_address


def is_address(host: str) -> bool:
    """Whether a backend's host is an IP address, and so needs no DNS."""
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def assignment(name: str, *addresses: Address) -> ClusterLoadAssignment:
    """Endpoints of a cluster, all in one locality."""
    endpoints = [LbEndpoint(endpoint=Endpoint(address=address)) for address in addresses]
    return ClusterLoadAssignment(cluster_name=name, endpoints=[LocalityLbEndpoints(lb_endpoints=endpoints)])


def endpoints(backend: Backend) -> ClusterLoadAssignment:
    """Where ``bk_<id>`` connects to."""
    return assignment(names.backend_cluster(backend.id), socket_address(backend.uri.host, backend.uri.port))
