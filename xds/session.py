"""One ADS stream as a state machine without I/O: requests and snapshots go in, responses come out.

``on_request`` and ``on_snapshot`` give the responses to send, in order. What each means on the wire is said at
https://www.envoyproxy.io/docs/envoy/latest/api-docs/xds_protocol.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from xds.messages import DeltaRequest, DeltaResponse, SotwRequest, SotwResponse
from xds.snapshot import ENDPOINTS, Resource, Snapshot, content_version
from xds.staging import RESPONSE_MAX_BYTES, WILDCARD_TYPES, Session
from xds.subscription import Change, Subscription

WILDCARD: Final = "*"


class DeltaSession(Session[DeltaRequest, DeltaResponse]):
    """A stream of DeltaAggregatedResources."""

    def on_request(self, request: DeltaRequest) -> list[DeltaResponse]:
        """Take an ACK, a NACK or a change of subscription, or several of them in one request.

        A stale nonce answers nothing, but its request's change of subscription counts.
        """
        subscription = self._subscriptions.get(request.type_url)
        first = subscription is None
        if subscription is None:
            subscription = self._open(request.type_url)
            versions = request.initial_resource_versions or {}
            wildcard = not request.subscribe and request.type_url in WILDCARD_TYPES
            held = (Resource(name=name, version=version, body=b"") for name, version in versions.items())
            self._begin(subscription, wildcard=wildcard, held=held)
        else:
            self._answered(subscription, nonce=request.response_nonce, error_detail=request.error_detail)
        if WILDCARD in request.subscribe:
            self._begin(subscription, wildcard=True)
        if WILDCARD in request.unsubscribe:
            subscription.drop_wildcard()
        subscription.drop(name for name in request.unsubscribe if name != WILDCARD)
        known = first and request.type_url != ENDPOINTS  # a cluster that was warming when the stream broke still waits
        subscription.ask((name for name in request.subscribe if name != WILDCARD), known=known)
        return self._advance()

    def _respond(
        self, subscription: Subscription, change: Change, *, nonce: str, version: str, owed: bool
    ) -> DeltaResponse:
        return DeltaResponse(
            type_url=subscription.type_url,
            resources=change.upserts,
            removed=change.removed,
            nonce=nonce,
            system_version=version,
        )


class History:
    """The newest complete responses by type and version.

    A SotW client that reconnects tells only a version. If what it stands for is known, its clusters stay until
    its routes have left them.
    """

    def __init__(self, size_max: int = 64) -> None:
        self._size_max = size_max
        self._sent: dict[tuple[str, str], Mapping[str, Resource]] = {}

    def add(self, type_url: str, version: str, resources: Mapping[str, Resource]) -> None:
        """Remember a response; the oldest makes room."""
        if self._sent.pop((type_url, version), None) is None and len(self._sent) >= self._size_max:
            del self._sent[next(iter(self._sent))]
        self._sent[type_url, version] = dict(resources)

    def find(self, type_url: str, version: str) -> Mapping[str, Resource]:
        """What a version stood for; empty if it is not known."""
        return self._sent.get((type_url, version), {})


class SotwSession(Session[SotwRequest, SotwResponse]):
    """A stream of StreamAggregatedResources.

    ``history`` is shared by all streams: by it a reconnecting client is recognised.
    """

    def __init__(self, snapshot: Snapshot | None = None, *, history: History | None = None) -> None:
        super().__init__(snapshot)
        self._history = history or History()

    def on_request(self, request: SotwRequest) -> list[SotwResponse]:
        """Take an ACK, a NACK or a new list of names. A request with a stale nonce is ignored."""
        subscription = self._subscriptions.get(request.type_url)
        names = set(request.resource_names)
        if subscription is None:
            subscription = self._open(request.type_url)
            wildcard = WILDCARD in names or (not names and request.type_url in WILDCARD_TYPES)
            held = self._held(request.type_url, request.version_info) if wildcard else {}
            self._begin(subscription, wildcard=wildcard, held=held.values())
        elif request.response_nonce != subscription.nonce:
            return []
        else:
            self._answered(subscription, nonce=request.response_nonce, error_detail=request.error_detail)
        subscription.explicit = subscription.explicit or bool(names)
        if subscription.explicit:
            if WILDCARD in names and not subscription.wildcard:
                self._begin(subscription, wildcard=True)
            elif WILDCARD not in names and subscription.wildcard:
                subscription.drop_wildcard()
            names.discard(WILDCARD)
            subscription.drop(sorted(subscription.names - names))
            subscription.ask(sorted(names - subscription.names))
        return self._advance()

    def _held(self, type_url: str, version: str) -> Mapping[str, Resource]:
        if self._target is not None and self._target.version_of(type_url) == version:
            return self._target.of(type_url)
        return self._history.find(type_url, version)

    def _bytes_max(self, type_url: str) -> int | None:
        return None if type_url in WILDCARD_TYPES else RESPONSE_MAX_BYTES

    def _respond(
        self, subscription: Subscription, change: Change, *, nonce: str, version: str, owed: bool
    ) -> SotwResponse | None:
        resources = change.upserts
        if subscription.type_url in WILDCARD_TYPES:
            resources = tuple(resource for _, resource in sorted(subscription.has.items()))
            version = content_version(resources)
            self._history.add(subscription.type_url, version, subscription.has)
        elif not resources and not owed:
            return None
        return SotwResponse(type_url=subscription.type_url, resources=resources, nonce=nonce, version_info=version)
