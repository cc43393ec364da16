"""How a new snapshot reaches one client without a broken moment.

It goes in stages, so that no route ever points at a cluster the client lacks. A
stage ends when every response is ACKed; a NACK stops there, and what was ACKed stays in force:

========  ==============================================  ==================================
stage     secrets, clusters, endpoints                    listeners, scopes, routes
========  ==============================================  ==================================
PROVIDE   new and changed ones are sent                   still those of the snapshot before
REPOINT   nothing is taken away                           new; routes are not taken away yet
RETIRE    nothing is taken away                           routes no scope uses are taken away
REMOVE    what the snapshot lacks is taken away           new
========  ==============================================  ==================================

Envoy holds back the ACK of clusters until the last of them is warm (``ClusterManagerImpl::updateClusterCounts``),
which is why waiting for ACKs is enough, and a changed cluster is warm only when its endpoints were sent again
(https://www.envoyproxy.io/docs/envoy/latest/api-docs/xds_protocol, "Resource warming").
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from enum import IntEnum
from typing import Final, Generic, TypeVar

from xds.messages import DeltaRequest, DeltaResponse, SotwRequest, SotwResponse, TypeState
from xds.snapshot import (
    CLUSTER,
    ENDPOINTS,
    LISTENER,
    ROUTE,
    SCOPED_ROUTE,
    SECRET,
    Resource,
    Snapshot,
)
from xds.subscription import Change, Subscription

SEND_ORDER: Final = (SECRET, CLUSTER, ENDPOINTS, LISTENER, SCOPED_ROUTE, ROUTE)
POINTERS: Final = frozenset({LISTENER, SCOPED_ROUTE, ROUTE})
"""Types that point at clusters; every other type provides what they point at."""
WILDCARD_TYPES: Final = frozenset({LISTENER, CLUSTER, SCOPED_ROUTE})
"""Types that Envoy takes as a whole: an empty first request means all, and in SotW a response is complete."""
RESPONSE_MAX_BYTES: Final = 512 * 1024
"""Larger changes go in several responses where the protocol allows it, so that no stream holds up the others."""


class Stage(IntEnum):
    """How far a client is on the way to a snapshot."""

    PROVIDE = 0
    REPOINT = 1
    RETIRE = 2
    REMOVE = 3


REMOVED_FROM: Final[Mapping[str, Stage]] = {
    LISTENER: Stage.REPOINT,
    SCOPED_ROUTE: Stage.REPOINT,
    ROUTE: Stage.RETIRE,
}
"""First stage in which resources of a type are taken away; REMOVE for the others."""


Request = TypeVar("Request", bound=DeltaRequest | SotwRequest)
Response = TypeVar("Response", bound=DeltaResponse | SotwResponse)


class Session(ABC, Generic[Request, Response]):
    """What both ADS protocols share: stages, order, and one response in flight per type."""

    def __init__(self, snapshot: Snapshot | None = None) -> None:
        self._target = snapshot
        self._in_force: Snapshot | None = None  # where pointers come from until the clusters are provided
        self._stage = Stage.PROVIDE
        self._given_up: dict[str, dict[str, Resource]] = {}  # of targets that a newer one replaced while in PROVIDE
        self._union: dict[str, Mapping[str, Resource]] = {}
        self._subscriptions: dict[str, Subscription] = {}
        self._nonces = 0

    @property
    def version(self) -> str:
        """Version of the snapshot the client is led to; empty before there is one."""
        return self._target.version if self._target else ""

    @property
    def converged(self) -> bool:
        """Whether the client has ACKed all of the snapshot that it subscribed to."""
        return self._target is not None and self._stage is Stage.REMOVE and self._settled()

    @property
    def states(self) -> tuple[TypeState, ...]:
        """How each subscribed type stands, in sending order."""
        return tuple(
            TypeState(
                type_url=each.type_url,
                sent_version=each.in_flight.version if each.in_flight else each.acked_version,
                acked_version=each.acked_version,
                nack=each.nack,
            )
            for each in self._ordered()
        )

    @abstractmethod
    def on_request(self, request: Request) -> list[Response]:
        """Take a request: an ACK, a NACK or a change of subscription."""

    def on_snapshot(self, snapshot: Snapshot) -> list[Response]:
        """Lead the client to a snapshot; one that is under way is given up."""
        if snapshot.version == self.version:
            return []
        if self._target is not None and self._stage is Stage.PROVIDE:
            self._keep_asked_for(self._target)
        self._target = snapshot
        self._enter(Stage.PROVIDE)
        return self._advance()

    def _keep_asked_for(self, given_up: Snapshot) -> None:
        """A cluster that is under way may still ask for its endpoints; without them its ACK never comes."""
        for type_url in given_up.resources.keys() - WILDCARD_TYPES - POINTERS:
            self._given_up.setdefault(type_url, {}).update(given_up.of(type_url))

    def _answered(self, subscription: Subscription, *, nonce: str, error_detail: str | None) -> None:
        """ACK or NACK the response in flight, if it is the one that the nonce names."""
        sent = subscription.in_flight
        if sent is None or sent.nonce != nonce:
            return
        if error_detail is None:
            subscription.ack()
            return
        subscription.refuse(error_detail)
        for resource in sent.upserts:
            self._given_up.get(subscription.type_url, {}).pop(resource.name, None)
        self._union.clear()

    def _open(self, type_url: str) -> Subscription:
        subscription = self._subscriptions[type_url] = Subscription(type_url)
        if type_url == CLUSTER and self._stage is not Stage.PROVIDE:
            self._in_force = None  # nothing has been provided on this stream yet
            self._enter(Stage.PROVIDE)
        return subscription

    def _begin(self, subscription: Subscription, *, wildcard: bool, held: Iterable[Resource] = ()) -> None:
        """Start a subscription from what the client says it holds.

        Envoy's first request of a type waits for an answer, even an empty one. A reconnected client that
        holds something the target lacks is answered too: its ACK comes after its requests for the other types,
        so until then nothing is taken from it.
        """
        subscription.start(wildcard=wildcard, held=held)
        target = self._target.of(subscription.type_url) if self._target else {}
        new = wildcard and not subscription.has
        subscription.owed = subscription.owed or new or not subscription.has.keys() <= target.keys()
        view = self._view(subscription.type_url, self._target) if self._target else None
        if view is not None:
            subscription.review(view)

    def _advance(self) -> list[Response]:
        """Send what is due, and go through the stages as far as the client's ACKs allow."""
        responses: list[Response] = []
        while self._target is not None:
            for subscription in self._ordered():
                response = self._next_response(subscription, self._target)
                if response is not None:
                    responses.append(response)
            if self._stage is Stage.REMOVE or not self._settled():
                break
            self._enter(Stage(self._stage + 1))
        return responses

    def _next_response(self, subscription: Subscription, target: Snapshot) -> Response | None:
        type_url = subscription.type_url
        view = self._view(type_url, target)
        if view is None:
            return None
        change = subscription.take(
            view,
            removes=self._stage >= REMOVED_FROM.get(type_url, Stage.REMOVE),
            says_missing=type_url not in POINTERS or self._stage is not Stage.PROVIDE,
            bytes_max=self._bytes_max(type_url),
        )
        if change is None:
            return None
        owed = subscription.owed
        before = subscription.applied(change)
        if type_url == CLUSTER:
            self._warm(change, target)
        nonce = str(self._nonces + 1)
        response = self._respond(subscription, change, nonce=nonce, version=target.version_of(type_url), owed=owed)
        if response is None:
            return None
        self._nonces += 1
        subscription.sent(change, nonce=nonce, version=response.version, before=before)
        return response

    def _warm(self, change: Change, target: Snapshot) -> None:
        """A changed cluster waits for its endpoints, though delta Envoy will not ask for a name it already has."""
        endpoints = self._subscriptions.get(ENDPOINTS)
        if endpoints is None:
            return
        for cluster in change.upserts:
            for snapshot in filter(None, (target, self._in_force)):
                for name in snapshot.referred(CLUSTER, cluster.name, ENDPOINTS):
                    endpoints.repeat(name)

    def _view(self, type_url: str, target: Snapshot) -> Mapping[str, Resource] | None:
        """What the client should see of a type in this stage; None: nothing yet."""
        if self._stage is not Stage.PROVIDE:
            return target.of(type_url)
        if type_url in POINTERS:
            return self._in_force.of(type_url) if self._in_force else None
        if type_url not in self._union:
            in_force = (self._in_force or target).of(type_url)
            given_up = self._given_up.get(type_url)
            unchanged = in_force is target.of(type_url) and not given_up
            self._union[type_url] = in_force if unchanged else {**(given_up or {}), **in_force, **target.of(type_url)}
        return self._union[type_url]

    def _enter(self, stage: Stage) -> None:
        self._stage = stage
        self._union.clear()
        if stage is Stage.REPOINT:
            self._in_force = self._target
            self._given_up.clear()
        for subscription in self._subscriptions.values():
            view = self._view(subscription.type_url, self._target) if self._target else None
            if view is not None:
                subscription.review(view)

    def _settled(self) -> bool:
        gate = self._subscriptions.values()
        return all(each.settled for each in gate if self._stage is not Stage.PROVIDE or each.type_url not in POINTERS)

    def _ordered(self) -> list[Subscription]:
        others = sorted(self._subscriptions.keys() - set(SEND_ORDER))
        return [self._subscriptions[each] for each in (*others, *SEND_ORDER) if each in self._subscriptions]

    def _bytes_max(self, type_url: str) -> int | None:
        """How much one response of a type may hold; None: it must be complete."""
        return RESPONSE_MAX_BYTES

    @abstractmethod
    def _respond(
        self, subscription: Subscription, change: Change, *, nonce: str, version: str, owed: bool
    ) -> Response | None:
        """The response that carries a change; None if the protocol has no words for it."""
