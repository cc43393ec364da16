"""Messages by hand are those of envoy-data-plane."""

from __future__ import annotations

import contextlib

import pytest
from envoy_data_plane.envoy.config.core.v3 import Extension, Node
from envoy_data_plane.envoy.service.discovery.v3 import (
    DeltaDiscoveryRequest,
    DeltaDiscoveryResponse,
    DiscoveryRequest,
    DiscoveryResponse,
)
from envoy_data_plane.google.rpc import Status
from hypothesis import given
from hypothesis import strategies as st

from xds.messages import DeltaRequest, DeltaResponse, SotwRequest, SotwResponse
from xds.snapshot import Resource
from xds.wire import WireError, read_delta_request, read_sotw_request, write_delta_response, write_sotw_response

text = st.text(max_size=12)
texts = st.lists(text, max_size=4)
errors = st.none() | st.text(max_size=200)
resources = st.lists(st.builds(Resource, name=text, version=text, body=st.binary(max_size=300)), max_size=4)
A_NODE = Node(id="envoy", cluster="edge", extensions=[Extension(name="envoy.filters.http.router")] * 3)


@given(names=texts, gone=texts, versions=st.dictionaries(text, text, max_size=4), nonce=text, error=errors)
def test_delta_requests(
    names: list[str], gone: list[str], versions: dict[str, str], nonce: str, error: str | None
) -> None:
    message = DeltaDiscoveryRequest(
        node=A_NODE,
        type_url="t",
        resource_names_subscribe=names,
        resource_names_unsubscribe=gone,
        initial_resource_versions=versions,
        response_nonce=nonce,
        error_detail=None if error is None else Status(code=13, message=error),
    )
    assert read_delta_request(bytes(message)) == DeltaRequest(
        type_url="t",
        subscribe=tuple(names),
        unsubscribe=tuple(gone),
        initial_resource_versions=versions,
        response_nonce=nonce,
        error_detail=error,
        node="envoy",
    )


@given(names=texts, version=text, nonce=text, error=errors)
def test_sotw_requests(names: list[str], version: str, nonce: str, error: str | None) -> None:
    message = DiscoveryRequest(
        node=A_NODE,
        type_url="t",
        resource_names=names,
        version_info=version,
        response_nonce=nonce,
        error_detail=None if error is None else Status(code=13, message=error),
    )
    assert read_sotw_request(bytes(message)) == SotwRequest(
        type_url="t",
        resource_names=tuple(names),
        version_info=version,
        response_nonce=nonce,
        error_detail=error,
        node="envoy",
    )


@given(carried=resources, removed=texts, nonce=text, version=text)
def test_delta_responses(carried: list[Resource], removed: list[str], nonce: str, version: str) -> None:
    written = write_delta_response(
        DeltaResponse(
            type_url="t", resources=tuple(carried), removed=tuple(removed), nonce=nonce, system_version=version
        )
    )
    read = DeltaDiscoveryResponse.parse(written)
    assert (read.type_url, read.nonce, read.system_version_info) == ("t", nonce, version)
    assert read.removed_resources == removed
    assert [(r.name, r.version, r.resource.value) for r in read.resources if r.resource] == [
        (r.name, r.version, r.body) for r in carried
    ]
    assert all(r.resource and r.resource.type_url == "t" for r in read.resources)


@given(carried=resources, nonce=text, version=text)
def test_sotw_responses(carried: list[Resource], nonce: str, version: str) -> None:
    written = write_sotw_response(
        SotwResponse(type_url="t", resources=tuple(carried), nonce=nonce, version_info=version)
    )
    read = DiscoveryResponse.parse(written)
    assert (read.type_url, read.nonce, read.version_info) == ("t", nonce, version)
    assert [(each.type_url, each.value) for each in read.resources] == [("t", r.body) for r in carried]


@given(message=st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(message: bytes) -> None:
    for read in (read_delta_request, read_sotw_request):
        with contextlib.suppress(WireError):
            read(message)


@pytest.mark.parametrize("message", [b"\x12\x05ab", b"\x12\xff", b"\x12\x01\xff", b"\x0b", b"\x09ab"], ids=repr)
def test_broken_bytes_are_refused(message: bytes) -> None:
    with pytest.raises(WireError):
        read_delta_request(message)
