"""Which answers ext_proc is to see: a matter of routes alone, because a changed listener drains every connection."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from envoy_data_plane.envoy.config.route.v3 import RouteConfiguration
from envoy_data_plane.envoy.extensions.filters.http.ext_proc.v3 import (
    ExtProcPerRoute,
    ProcessingModeBodySendMode,
    ProcessingModeHeaderSendMode,
)

from gateway import names
from gateway.settings import XdsSettings
from policies.model import Policy
from tests.unit.policies.policy_builders import a_model, a_policy, a_share
from xds import snapshot
from xds.resources.build import ResourceBuilder
from xds.resources.filters import EXT_PROC, script

SETTINGS = XdsSettings()
UNROUTED = names.model_routes(names.SCOPE_UNROUTED)


def a_split(*, silent: bool) -> Policy:
    """A policy of two backends, of which one may report no usage."""
    policy = a_policy(a_model(a_share("a"), a_share("b")))
    quiet, other = policy.backends
    return replace(policy, backends=(replace(quiet, reports_usage=not silent), other))


def built(*, silent: bool) -> Any:
    return ResourceBuilder(SETTINGS).build(a_split(silent=silent), {}).bodies


def modes(*, silent: bool) -> dict[tuple[str, bool], tuple[str, str]]:
    """Response modes of each route that has its own, by path and whether it wants an idempotency key."""
    found = {}
    for route in RouteConfiguration.parse(built(silent=silent)[snapshot.ROUTE][UNROUTED]).virtual_hosts[0].routes:
        config = route.typed_per_filter_config.get(EXT_PROC)
        if config is None or route.match is None:
            continue
        overrides = ExtProcPerRoute.parse(config.value).overrides
        if overrides is not None and overrides.processing_mode is not None:
            mode = overrides.processing_mode
            with_key = any(header.name == names.HEADER_IDEMPOTENCY_KEY for header in route.match.headers)
            found[route.match.path or "", with_key] = (
                ProcessingModeHeaderSendMode(mode.response_header_mode).name or "",
                ProcessingModeBodySendMode(mode.response_body_mode).name or "",
            )
    return found


def test_a_silent_backend_changes_the_unrouted_routes_and_nothing_else() -> None:
    without, with_one = built(silent=False), built(silent=True)
    changed = {
        (kind, name)
        for kind, bodies in without.items()
        for name, body in bodies.items()
        if with_one[kind][name] != body
    }
    assert changed == {(snapshot.ROUTE, UNROUTED)}
    assert {kind: set(bodies) for kind, bodies in without.items()} == {k: set(b) for k, b in with_one.items()}


@pytest.mark.parametrize("silent", [False, True], ids=["all report", "one is silent"])
def test_answers_of_inference_are_seen_whole_and_those_to_a_key_as_they_come(silent: bool) -> None:
    found = modes(silent=silent)
    assert found["/v1/inference", False] == ("SEND", "BUFFERED")
    assert found["/v1/chat/completions", True] == ("SEND", "STREAMED")


def test_headers_of_all_answers_are_seen_where_a_backend_is_silent() -> None:
    assert ("/v1/chat/completions", False) not in modes(silent=False)
    found = modes(silent=True)
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"):
        assert found[path, False] == ("SEND", "NONE")


@pytest.mark.parametrize("name", ["strip_usage.lua", "rename_model.lua"])
def test_no_mark_is_left_in_a_script(name: str) -> None:
    assert "@" not in script(name)
