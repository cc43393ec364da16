"""AggregatedDiscoveryService over grpc.aio: moves bytes between Envoys and their sessions.

Each stream is one task that reads and writes, so responses keep the session's order and a slow client slows
only itself. A new snapshot sets a flag on every stream; a stream that is busy finds the newest when it looks.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
import stat
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Generic, Literal

import grpc
from prometheus_client import CollectorRegistry, Counter, Gauge

from gateway.telemetry import get_logger
from xds import wire
from xds.fleet import Fleet
from xds.session import DeltaSession, History, SotwSession
from xds.snapshot import Snapshot, short_name
from xds.staging import Request, Response, Session

SERVICE: Final = "envoy.service.discovery.v3.AggregatedDiscoveryService"
MESSAGE_MAX_BYTES: Final = 256 * 1024 * 1024
SOCKET_MODE: Final = 0o660

_OPTIONS: Final = (
    ("grpc.max_receive_message_length", MESSAGE_MAX_BYTES),
    ("grpc.max_send_message_length", MESSAGE_MAX_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.so_reuseport", 0),
)

log = get_logger()

Context = grpc.aio.ServicerContext[bytes, bytes]


class AddressInUse(Exception):
    """Another server listens there."""


class Metrics:
    """What the control plane counts; ``type`` is one of ``snapshot.SHORT_NAMES`` or ``other``."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.streams = Gauge("router_xds_streams", "Open ADS streams.", ["protocol"], registry=registry)
        self.pushes = Counter("router_xds_pushes_total", "Discovery responses sent.", ["type"], registry=registry)
        self.push_bytes = Counter("router_xds_push_bytes", "Bytes of discovery responses.", ["type"], registry=registry)
        self.nacks = Counter("router_xds_nacks_total", "Discovery responses refused.", ["type"], registry=registry)
        self.snapshot = Gauge("router_xds_snapshot_info", "The current snapshot.", ["version"], registry=registry)
        self.resources = Gauge(
            "router_xds_snapshot_resources", "Resources in the current snapshot.", ["type"], registry=registry
        )

    def published(self, snapshot: Snapshot) -> None:
        """Show a snapshot as the current one."""
        self.snapshot.clear()
        self.snapshot.labels(snapshot.version).set(1)
        self.resources.clear()
        for type_url, resources in snapshot.resources.items():
            self.resources.labels(short_name(type_url)).set(len(resources))


@dataclass(slots=True, kw_only=True, eq=False)
class Stream(Generic[Request, Response]):
    """One open stream: its session, its codec, and the flag that there is news."""

    id: int
    protocol: Literal["delta", "sotw"]
    session: Session[Request, Response]
    read: Callable[[bytes], Request]
    write: Callable[[Response], bytes]
    news: asyncio.Event = field(default_factory=asyncio.Event)
    node: str | None = None


class AdsServer:
    """Serves one snapshot at a time to every Envoy that connects."""

    def __init__(
        self, *, registry: CollectorRegistry, fleet: Fleet | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        self.fleet = fleet or Fleet()
        self.snapshot: Snapshot | None = None
        self._metrics = Metrics(registry)
        self._clock = clock
        self._history = History()
        self._news: set[asyncio.Event] = set()
        self._ids = itertools.count(1)
        self._server: grpc.aio.Server | None = None
        self._stopping = False

    def set_snapshot(self, snapshot: Snapshot) -> None:
        """Publish a snapshot to every stream, and to those that open later."""
        if self.snapshot is not None and self.snapshot.version == snapshot.version:
            return
        self.snapshot = snapshot
        self._metrics.published(snapshot)
        for news in self._news:
            news.set()

    async def start(self, addresses: Sequence[str]) -> None:
        """Listen on ``unix:<path>`` and ``host:port`` addresses.

        Raises:
            AddressInUse: another server listens on one of them.
        """
        server = grpc.aio.server(options=_OPTIONS, maximum_concurrent_rpcs=None)
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "DeltaAggregatedResources": grpc.stream_stream_rpc_method_handler(self._delta),
            "StreamAggregatedResources": grpc.stream_stream_rpc_method_handler(self._sotw),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        for address in addresses:
            _listen(server, address)
        await server.start()
        self._server = server
        log.info("ads_started", addresses=list(addresses))

    async def stop(self, grace_s: float = 1.0) -> None:
        """Close every stream; Envoy keeps what it has and tries again."""
        self._stopping = True
        for news in self._news:
            news.set()
        if self._server is not None:
            await self._server.stop(grace_s)

    async def _delta(self, _: object, context: Context) -> None:
        session = DeltaSession(self.snapshot)
        await self._serve(
            context,
            Stream(
                id=next(self._ids),
                protocol="delta",
                session=session,
                read=wire.read_delta_request,
                write=wire.write_delta_response,
            ),
        )

    async def _sotw(self, _: object, context: Context) -> None:
        session = SotwSession(self.snapshot, history=self._history)
        await self._serve(
            context,
            Stream(
                id=next(self._ids),
                protocol="sotw",
                session=session,
                read=wire.read_sotw_request,
                write=wire.write_sotw_response,
            ),
        )

    async def _serve(self, context: Context, stream: Stream[Request, Response]) -> None:
        self._news.add(stream.news)
        gauge = self._metrics.streams.labels(stream.protocol)
        gauge.inc()
        reading = asyncio.ensure_future(context.read())
        waking = asyncio.ensure_future(stream.news.wait())
        try:
            while not self._stopping:
                await asyncio.wait((reading, waking), return_when=asyncio.FIRST_COMPLETED)
                if waking.done():
                    stream.news.clear()
                    waking = asyncio.ensure_future(stream.news.wait())
                    await self._tell(context, stream)
                if reading.done():
                    message = reading.result()
                    if not isinstance(message, bytes):  # the end of the stream
                        break
                    await self._answer(context, stream, message)
                    reading = asyncio.ensure_future(context.read())
        except wire.WireError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        finally:
            reading.cancel()
            waking.cancel()
            gauge.dec()
            self._news.discard(stream.news)
            self.fleet.disconnected(stream.id, now_s=self._clock())
            log.info("ads_stream_closed", node=stream.node, address=context.peer(), protocol=stream.protocol)

    async def _tell(self, context: Context, stream: Stream[Request, Response]) -> None:
        if self.snapshot is not None:
            await self._send(context, stream, stream.session.on_snapshot(self.snapshot))

    async def _answer(self, context: Context, stream: Stream[Request, Response], message: bytes) -> None:
        request = stream.read(message)
        if stream.node is None:
            stream.node = request.node
            peer = context.peer()
            self.fleet.connected(
                stream.id, node_id=request.node, address=peer, protocol=stream.protocol, now_s=self._clock()
            )
            log.info("ads_stream_opened", node=request.node, address=peer, protocol=stream.protocol)
        responses = stream.session.on_request(request)
        if request.error_detail is not None:
            self._note_nack(stream, request)
        await self._send(context, stream, responses)

    def _note_nack(self, stream: Stream[Request, Response], request: Request) -> None:
        kind = short_name(request.type_url)
        self._metrics.nacks.labels(kind).inc()
        nacks = (state.nack for state in stream.session.states if state.type_url == request.type_url)
        version = next((nack.version for nack in nacks if nack and nack.nonce == request.response_nonce), "")
        log.warning("ads_nack", node=stream.node, type=kind, version=version, message=request.error_detail)

    async def _send(self, context: Context, stream: Stream[Request, Response], responses: Iterable[Response]) -> None:
        if stream.node is not None:
            self.fleet.reported(
                stream.id,
                stream.session.states,
                snapshot_version=stream.session.version,
                converged=stream.session.converged,
                now_s=self._clock(),
            )
        for response in responses:
            message = stream.write(response)
            kind = short_name(response.type_url)
            self._metrics.pushes.labels(kind).inc()
            self._metrics.push_bytes.labels(kind).inc(len(message))
            await context.write(message)


def _listen(server: grpc.aio.Server, address: str) -> None:
    path = Path(address.removeprefix("unix:")) if address.startswith("unix:") else None
    if path is not None:
        _remove_stale(path)
    try:
        bound = server.add_insecure_port(address)
    except RuntimeError as error:
        raise AddressInUse(f"{address}: {error}") from error
    if path is not None:
        path.chmod(SOCKET_MODE)
    elif bound == 0:
        raise AddressInUse(address)


def _remove_stale(path: Path) -> None:
    """Remove a socket that its server left behind; one that still answers is somebody's."""
    if not path.exists() or not stat.S_ISSOCK(path.stat().st_mode):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            path.unlink()
            return
    raise AddressInUse(f"unix:{path}: another server listens there")
