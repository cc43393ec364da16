"""An Envoy as the session sees one: applies responses, warms clusters, subscribes to what it finds it needs.

Bodies are text: an edition, then the names the resource points at. ``bad`` in a body makes the client refuse
it. As in Envoy, clusters are ACKed only when the last of them is warm.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from xds.messages import DeltaRequest, DeltaResponse, SotwRequest, SotwResponse
from xds.session import DeltaSession, History, SotwSession
from xds.snapshot import CLUSTER, ENDPOINTS, LISTENER, ROUTE, SCOPED_ROUTE, Reference, Snapshot

POINTS_AT = {CLUSTER: ENDPOINTS, SCOPED_ROUTE: ROUTE, ROUTE: CLUSTER}
COMPLETE = frozenset({LISTENER, CLUSTER, SCOPED_ROUTE})


def a_snapshot(
    *,
    listeners: Mapping[str, str] | None = None,
    scopes: Mapping[str, str] | None = None,
    routes: Mapping[str, str] | None = None,
    clusters: Mapping[str, str] | None = None,
    endpoints: Mapping[str, str] | None = None,
) -> Snapshot:
    """A snapshot of text bodies: an edition and the names pointed at, as in ``routes={"r": "1 a b"}``."""
    texts = {
        LISTENER: listeners or {},
        SCOPED_ROUTE: scopes or {},
        ROUTE: routes or {},
        CLUSTER: clusters or {},
        ENDPOINTS: endpoints or {},
    }
    references: dict[Reference, frozenset[Reference]] = {
        (kind, name): frozenset((POINTS_AT[kind], target) for target in points_at(text.encode()))
        for kind in POINTS_AT
        for name, text in texts[kind].items()
    }
    messages = {kind: {name: text.encode() for name, text in named.items()} for kind, named in texts.items()}
    return Snapshot.build(messages, references=references)


def points_at(body: bytes) -> tuple[str, ...]:
    """Names in a body."""
    return tuple(body.decode().split()[1:])


def refused(body: bytes) -> bool:
    """Whether the client refuses a resource."""
    return body.startswith(b"bad")


@dataclass
class Envoy:
    """One client, its stream, and the session at the other end; ``say`` and ``hear`` move one message."""

    delta: bool
    partial: bool = False
    """Whether the good resources of a refused response are applied, as Envoy does with clusters."""
    history: History = field(default_factory=History)
    snapshot: Snapshot | None = None
    held: dict[str, dict[str, bytes]] = field(default_factory=dict)
    versions: dict[str, dict[str, str]] = field(default_factory=dict)
    accepted: dict[str, str] = field(default_factory=dict)
    warming: dict[str, bytes] = field(default_factory=dict)
    wanted: dict[str, set[str]] = field(default_factory=dict)
    nacks: int = 0

    def __post_init__(self) -> None:
        self.connect()

    def connect(self) -> None:
        """Open a stream; on a later call, the stream broke and all that was under way is lost."""
        self.session = DeltaSession(self.snapshot) if self.delta else SotwSession(self.snapshot, history=self.history)
        self.up: deque[DeltaRequest | SotwRequest] = deque()
        self.down: deque[DeltaResponse | SotwResponse] = deque()
        self.nonces: dict[str, str] = {}
        self.unanswered: dict[str, DeltaResponse | SotwResponse] = {}
        self.asked_again: set[tuple[str, str]] = set()
        self.may_time_out = not self.delta and bool(self.warming)
        self.opened: set[str] = set()
        self.last: DeltaRequest | SotwRequest | None = None
        self.fresh = {CLUSTER, ENDPOINTS, LISTENER, SCOPED_ROUTE, ROUTE}
        self.unsure_types: set[str] = set()
        for type_url in (CLUSTER, ENDPOINTS, LISTENER, SCOPED_ROUTE, ROUTE):
            if type_url in COMPLETE or self.wanted.get(type_url):
                self._first(type_url)

    def publish(self, snapshot: Snapshot) -> None:
        """The control plane has a new snapshot, which shares what is unchanged with the last one."""
        messages = {kind: {n: r.body for n, r in named.items()} for kind, named in snapshot.resources.items()}
        self.snapshot = Snapshot.build(messages, references=snapshot.references, previous=self.snapshot)
        self.down.extend(self.session.on_snapshot(self.snapshot))

    def say(self) -> None:
        """The server reads one request."""
        if self.up:
            self.down.extend(self.session.on_request(self.up.popleft()))  # type: ignore[arg-type]

    def hear(self) -> None:
        """The client reads one response."""
        if not self.down:
            return
        response = self.down.popleft()
        self.nonces[response.type_url] = response.nonce
        self._check_news(response)
        if any(refused(resource.body) for resource in response.resources):
            self.nacks += 1
            self.unsure_types.add(response.type_url)
            if self.partial and response.type_url in COMPLETE:
                self._apply(response, record=False)
            self._answer(response, "refused")
            return
        self._apply(response, record=True)
        if response.type_url == CLUSTER and self.warming:
            self.unanswered[CLUSTER] = response
        else:
            self._answer(response, None)
        self._warmed()
        self._check_routes()

    def repeat_last(self) -> None:
        """The last request arrives once more, by then with a nonce that may be stale."""
        if self.last is not None:
            self.up.append(self.last)

    def settle(self, steps_max: int = 2000) -> None:
        """Let both sides talk until neither has anything to say."""
        for _ in range(steps_max):
            if not (self.up or self.down or self.warming):
                return
            if not (self.up or self.down):
                self._give_up_warming()
            self.say()
            self.hear()
        raise AssertionError("the dialogue does not end")

    @property
    def active(self) -> set[str]:
        """Clusters that can serve: a new one only once it is warm."""
        return set(self.held.get(CLUSTER, {}))

    def _apply(self, response: DeltaResponse | SotwResponse, *, record: bool) -> None:
        kind = response.type_url
        self.fresh.discard(kind)
        bodies = {r.name: r.body for r in response.resources if not refused(r.body)}
        if isinstance(response, DeltaResponse):
            removed = set(response.removed)
        elif kind in COMPLETE:
            removed = {*self.held.get(kind, ()), *(self.warming if kind == CLUSTER else ())}
            removed -= {resource.name for resource in response.resources}
        else:
            removed = set()
        if record:
            self._record(response, removed)
        if kind not in COMPLETE:
            bodies = {name: body for name, body in bodies.items() if name in self.wanted.get(kind, ())}
        if kind == CLUSTER:
            self._apply_clusters(bodies, removed)
        else:
            held = self.held.setdefault(kind, {})
            for name in removed if kind != ROUTE else ():  # Envoy ignores the removal of routes
                held.pop(name, None)
            held.update(bodies)
        if kind == ENDPOINTS:
            self._warmed_by(bodies.keys() | removed)
        self._want(ENDPOINTS, CLUSTER, {**self.held.get(CLUSTER, {}), **self.warming})
        self._want(ROUTE, SCOPED_ROUTE, self.held.get(SCOPED_ROUTE, {}))

    def _warmed(self) -> None:
        if not self.warming and (held_back := self.unanswered.pop(CLUSTER, None)):
            self._answer(held_back, None)

    def _give_up_warming(self) -> None:
        """Envoy's initial_fetch_timeout: only SotW, where no word says that something does not exist, needs it."""
        assert self.may_time_out, f"{[*self.warming]} wait for their endpoints in vain"
        self.held.setdefault(CLUSTER, {}).update(self.warming)
        self.warming.clear()
        self._warmed()

    def _warmed_by(self, endpoints: set[str]) -> None:
        for name, body in list(self.warming.items()):
            if endpoints.issuperset(points_at(body)):
                self.held.setdefault(CLUSTER, {})[name] = self.warming.pop(name)

    def _apply_clusters(self, bodies: Mapping[str, bytes], removed: set[str]) -> None:
        held = self.held.setdefault(CLUSTER, {})
        for name in removed:
            held.pop(name, None)
            self.warming.pop(name, None)
        for name, body in bodies.items():
            if self.warming.get(name, held.get(name)) == body:
                continue
            self.warming.pop(name, None)
            if points_at(body):
                self.warming[name] = body
            else:
                held[name] = body

    def _record(self, response: DeltaResponse | SotwResponse, removed: set[str]) -> None:
        if isinstance(response, SotwResponse):
            self.accepted[response.type_url] = response.version_info
            return
        versions = self.versions.setdefault(response.type_url, {})
        for name in removed:
            versions.pop(name, None)
        versions.update((resource.name, resource.version) for resource in response.resources)

    def _want(self, kind: str, parent: str, parents: Mapping[str, bytes]) -> None:
        """Subscribe to what the parents point at, as Envoy does before it ACKs them."""
        names = {target for body in parents.values() for target in points_at(body)}
        before = self.wanted.get(kind, set())
        if names == before:
            return
        self.wanted[kind] = names
        self.asked_again |= {(kind, name) for name in names - before}
        for name in before - names:
            self.held.get(kind, {}).pop(name, None)
            self.versions.get(kind, {}).pop(name, None)
        if kind not in self.opened:
            self._first(kind)
        elif self.delta:
            self._send(
                DeltaRequest(
                    type_url=kind, subscribe=tuple(sorted(names - before)), unsubscribe=tuple(sorted(before - names))
                )
            )
        else:
            self._send(self._sotw(kind, None))

    def _first(self, kind: str) -> None:
        names = tuple(sorted(self.wanted.get(kind, ())))
        if self.delta:
            known = dict(self.versions.get(kind, {}))
            self._send(DeltaRequest(type_url=kind, subscribe=names, initial_resource_versions=known, node="envoy"))
        else:
            self._send(
                SotwRequest(type_url=kind, resource_names=names, version_info=self.accepted.get(kind, ""), node="envoy")
            )

    def _answer(self, response: DeltaResponse | SotwResponse, error: str | None) -> None:
        kind = response.type_url
        if self.delta:
            self._send(DeltaRequest(type_url=kind, response_nonce=response.nonce, error_detail=error))
        else:
            self._send(self._sotw(kind, error))

    def _sotw(self, kind: str, error: str | None) -> SotwRequest:
        return SotwRequest(
            type_url=kind,
            resource_names=tuple(sorted(self.wanted.get(kind, ()))),
            version_info=self.accepted.get(kind, ""),
            response_nonce=self.nonces.get(kind, ""),
            error_detail=error,
        )

    def _send(self, request: DeltaRequest | SotwRequest) -> None:
        self.opened.add(request.type_url)
        self.up.append(request)
        self.last = request

    def _check_news(self, response: DeltaResponse | SotwResponse) -> None:
        """Nothing comes twice, but for endpoints of a changed cluster, names asked for again, and after a NACK."""
        kind = response.type_url
        if kind in self.unsure_types or kind == ENDPOINTS or (kind in self.fresh and not self.delta):
            return
        bodies = {resource.name: resource.body for resource in response.resources}
        held = {**self.held.get(kind, {}), **(self.warming if kind == CLUSTER else {})}
        if not self.delta and kind in COMPLETE:
            assert bodies != held, f"all of {kind} again"
            return
        for name, body in bodies.items():
            again = (kind, name) in self.asked_again
            self.asked_again.discard((kind, name))
            assert again or held.get(name) != body, f"{name} again"

    def _check_routes(self) -> None:
        for name, body in self.held.get(ROUTE, {}).items():
            missing = set(points_at(body)) - self.active
            assert not missing, f"route {name} points at {missing}"
