"""Building blocks that every resource uses: Any, extensions, headers, structs with sorted keys."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta

import betterproto2
from envoy_data_plane.envoy.config.core.v3 import (
    Address,
    AggregatedConfigSource,
    ApiVersion,
    ConfigSource,
    HeaderValue,
    HeaderValueOption,
    HeaderValueOptionHeaderAppendAction,
    Metadata,
    Pipe,
    SocketAddress,
    TypedExtensionConfig,
)
from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager.v3 import HttpFilter
from envoy_data_plane.google.protobuf import Any, ListValue, Struct, Value

Json = str | float | bool | Mapping[str, "Json"] | tuple["Json", ...]


def extension(name: str, message: betterproto2.Message) -> TypedExtensionConfig:
    """A named extension configured by ``message``."""
    return TypedExtensionConfig(name=name, typed_config=Any.pack(message))


def http_filter(name: str, message: betterproto2.Message, *, disabled: bool = False) -> HttpFilter:
    """An HTTP filter; a disabled one runs only where a route turns it on."""
    return HttpFilter(name=name, typed_config=Any.pack(message), disabled=disabled)


def header(
    key: str,
    value: str,
    action: HeaderValueOptionHeaderAppendAction = HeaderValueOptionHeaderAppendAction.OVERWRITE_IF_EXISTS_OR_ADD,
) -> HeaderValueOption:
    """A header to add, replacing what is there unless ``action`` says otherwise."""
    return HeaderValueOption(header=HeaderValue(key=key, value=value), append_action=action)


def value(of: Json) -> Value:
    """A protobuf Value; objects get their keys sorted, so that equal content has equal bytes."""
    if isinstance(of, bool):
        return Value(bool_value=of)
    if isinstance(of, str):
        return Value(string_value=of)
    if isinstance(of, int | float):
        return Value(number_value=float(of))
    if isinstance(of, tuple):
        return Value(list_value=ListValue(values=[value(item) for item in of]))
    return Value(struct_value=struct(of))


def struct(of: Mapping[str, Json]) -> Struct:
    """A protobuf Struct with sorted keys."""
    return Struct(fields={key: value(of[key]) for key in sorted(of)})


def metadata(namespace: str, fields: Mapping[str, Json]) -> Metadata:
    """Static metadata of a cluster or route under one namespace."""
    return Metadata(filter_metadata={namespace: struct(fields)})


def ads() -> ConfigSource:
    """Where Envoy gets a resource: the same ADS stream, at once or after at most 15 s."""
    return ConfigSource(ads=AggregatedConfigSource(), resource_api_version=ApiVersion.V3)


def seconds(amount: float) -> timedelta:
    """A duration."""
    return timedelta(seconds=amount)


def socket_address(host: str, port: int) -> Address:
    """A TCP address."""
    return Address(socket_address=SocketAddress(address=host, port_value=port))


def pipe_address(path: str) -> Address:
    """A unix socket."""
    return Address(pipe=Pipe(path=path))
