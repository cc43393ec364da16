"""Envoy without the router: a static route to the backend, with or without an ext_proc server in the way.

Written out rather than built from ``xds.resources``, so that the yardstick stays when the router changes. What
decides the cost of ext_proc is as the router has it: two messages, buffered body, health-checked unix sockets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

BUFFER_BYTES: Final = 8 * 1024 * 1024
_TYPE: Final = "type.googleapis.com/envoy.extensions"
_HTTP_OPTIONS: Final = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"

Config = dict[str, Any]


def _address(port: int) -> Config:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


def _cluster(name: str, addresses: Sequence[Config], http: Config, **more: Any) -> Config:
    endpoints = [{"endpoint": {"address": address}} for address in addresses]
    return {
        "name": name,
        "type": "STATIC",
        "connect_timeout": "0.5s",
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": endpoints}]},
        "typed_extension_protocol_options": {
            _HTTP_OPTIONS: {
                "@type": f"{_TYPE}.upstreams.http.v3.HttpProtocolOptions",
                "explicit_http_config": http,
            }
        },
        **more,
    }


def _ext_proc_cluster(sockets: Sequence[str]) -> Config:
    windows = {"initial_stream_window_size": 1 << 20, "initial_connection_window_size": 16 << 20}
    check = {
        "timeout": "1s",
        "interval": "1s",
        "no_traffic_interval": "1s",
        "unhealthy_threshold": 1,
        "healthy_threshold": 1,
        "grpc_health_check": {"service_name": "envoy.service.ext_proc.v3.ExternalProcessor"},
    }
    return _cluster(
        "ext_proc",
        [{"pipe": {"path": socket}} for socket in sockets],
        {"http2_protocol_options": windows},
        health_checks=[check],
    )


def _ext_proc_filter() -> Config:
    return {
        "name": "envoy.filters.http.ext_proc",
        "typed_config": {
            "@type": f"{_TYPE}.filters.http.ext_proc.v3.ExternalProcessor",
            "grpc_service": {"envoy_grpc": {"cluster_name": "ext_proc"}},
            "processing_mode": {
                "request_header_mode": "SEND",
                "request_body_mode": "BUFFERED",
                "response_header_mode": "SKIP",
                "response_body_mode": "NONE",
                "request_trailer_mode": "SKIP",
                "response_trailer_mode": "SKIP",
            },
            "message_timeout": "5s",
            "failure_mode_allow": False,
        },
    }


def _listener(port: int, filters: Sequence[Config]) -> Config:
    route = {"match": {"prefix": "/"}, "route": {"cluster": "backend", "timeout": "0s"}}
    manager = {
        "@type": f"{_TYPE}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "public",
        "use_remote_address": True,
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
        "http_filters": [
            *filters,
            {
                "name": "envoy.filters.http.router",
                "typed_config": {"@type": f"{_TYPE}.filters.http.router.v3.Router"},
            },
        ],
    }
    network_filter = {"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}
    return {
        "name": "public",
        "address": _address(port),
        "per_connection_buffer_limit_bytes": BUFFER_BYTES,
        "filter_chains": [{"filters": [network_filter]}],
    }


def bootstrap(*, port: int, admin_port: int, backend_ports: Sequence[int], sockets: Sequence[str] = ()) -> Config:
    """Bootstrap of an Envoy that sends everything to the backend, through ext_proc when there are ``sockets``."""
    backend = _cluster("backend", [_address(each) for each in backend_ports], {"http_protocol_options": {}})
    return {
        "admin": {"address": _address(admin_port)},
        "static_resources": {
            "listeners": [_listener(port, [_ext_proc_filter()] if sockets else [])],
            "clusters": [backend, *([_ext_proc_cluster(sockets)] if sockets else [])],
        },
    }
