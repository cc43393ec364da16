"""Two clients against the real server on a unix socket; what goes over the wire is decoded by envoy-data-plane."""

from __future__ import annotations

import asyncio
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from tempfile import TemporaryDirectory

import grpc
import pytest
from envoy_data_plane.envoy.config.core.v3 import Node
from envoy_data_plane.envoy.service.discovery.v3 import (
    DeltaDiscoveryRequest,
    DeltaDiscoveryResponse,
    DiscoveryRequest,
    DiscoveryResponse,
)
from envoy_data_plane.google.rpc import Status
from prometheus_client import CollectorRegistry

from xds.server import SERVICE, AddressInUse, AdsServer
from xds.snapshot import CLUSTER, ENDPOINTS, ROUTE, Snapshot

WAIT_S = 5.0


def a_snapshot(*, routes: dict[str, bytes] | None = None, **clusters: bytes) -> Snapshot:
    return Snapshot.build({CLUSTER: clusters, ROUTE: routes or {}})


class Client:
    """An ADS client: one method a protocol, messages as envoy-data-plane has them."""

    def __init__(self, channel: grpc.aio.Channel, method: str) -> None:
        self._delta = method.startswith("Delta")
        self._call = channel.stream_stream(f"/{SERVICE}/{method}")()

    async def ask(self, type_url: str, **fields: object) -> None:
        request = DeltaDiscoveryRequest if self._delta else DiscoveryRequest
        await self._call.write(bytes(request(type_url=type_url, node=Node(id="envoy"), **fields)))

    async def hear(self) -> DeltaDiscoveryResponse | DiscoveryResponse:
        message = await asyncio.wait_for(self._call.read(), WAIT_S)
        assert isinstance(message, bytes), "the server closed the stream"
        return (DeltaDiscoveryResponse if self._delta else DiscoveryResponse).parse(message)

    async def ended(self) -> grpc.StatusCode:
        return await asyncio.wait_for(self._call.code(), WAIT_S)

    def leave(self) -> None:
        self._call.cancel()


class Bench:
    """The server on its socket and what opens clients to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.registry = CollectorRegistry()
        self.server = AdsServer(registry=self.registry)
        self.channel = grpc.aio.insecure_channel(
            f"unix:{path}", options=[("grpc.max_receive_message_length", 64 * 1024 * 1024)]
        )

    def delta(self) -> Client:
        return Client(self.channel, "DeltaAggregatedResources")

    def sotw(self) -> Client:
        return Client(self.channel, "StreamAggregatedResources")

    def sample(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, labels)

    async def until(self, text: str, *, converged: bool | None = None, connected: int | None = None) -> None:
        for _ in range(int(WAIT_S / 0.01)):
            version = self.server.snapshot.version if self.server.snapshot else ""
            summary = self.server.fleet.summary(version)
            if converged in {None, summary.converged} and connected in {None, summary.connected}:
                return
            await asyncio.sleep(0.01)
        pytest.fail(f"never {text}: {summary}")


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    with TemporaryDirectory(prefix="ads") as directory:
        bench = Bench(Path(directory) / "xds.sock")
        await bench.server.start([f"unix:{bench.path}"])
        yield bench
        await bench.channel.close()
        await bench.server.stop(0.1)


async def test_a_delta_client_gets_what_changed_and_converges(bench: Bench) -> None:
    bench.server.set_snapshot(a_snapshot(a=b"\x0a\x01a", b=b"\x0a\x01b"))
    client = bench.delta()
    await client.ask(CLUSTER)
    first = await client.hear()
    assert [(r.name, r.resource.type_url, r.resource.value) for r in first.resources] == [
        ("a", CLUSTER, b"\x0a\x01a"),
        ("b", CLUSTER, b"\x0a\x01b"),
    ]
    await client.ask(CLUSTER, response_nonce=first.nonce)
    await bench.until("converged", converged=True)

    bench.server.set_snapshot(a_snapshot(b=b"\x0a\x01b", c=b"\x0a\x01c"))
    second = await client.hear()
    assert [r.name for r in second.resources] == ["c"]
    await client.ask(CLUSTER, response_nonce=second.nonce)
    third = await client.hear()
    assert third.removed_resources == ["a"]


async def test_a_sotw_client_gets_everything_at_once(bench: Bench) -> None:
    bench.server.set_snapshot(a_snapshot(a=b"\x0a\x01a"))
    client = bench.sotw()
    await client.ask(CLUSTER)
    first = await client.hear()
    await client.ask(CLUSTER, version_info=first.version_info, response_nonce=first.nonce)
    await bench.until("converged", converged=True)
    bench.server.set_snapshot(a_snapshot(a=b"\x0a\x01a", c=b"\x0a\x01c"))
    second = await client.hear()
    assert [(r.type_url, r.value) for r in second.resources] == [(CLUSTER, b"\x0a\x01a"), (CLUSTER, b"\x0a\x01c")]
    assert second.type_url == CLUSTER


async def test_a_nack_by_one_client_leaves_the_other_alone(bench: Bench) -> None:
    bench.server.set_snapshot(a_snapshot(a=b"\x0a\x01a"))
    refuses, accepts = bench.delta(), bench.sotw()
    await refuses.ask(CLUSTER)
    refused = await refuses.hear()
    await refuses.ask(CLUSTER, response_nonce=refused.nonce, error_detail=Status(code=13, message="no such filter"))
    await accepts.ask(CLUSTER)
    heard = await accepts.hear()
    await accepts.ask(CLUSTER, version_info=heard.version_info, response_nonce=heard.nonce)
    await bench.until("connected", connected=2)
    await asyncio.sleep(0.1)
    summary = bench.server.fleet.summary(bench.server.snapshot.version if bench.server.snapshot else "")
    assert [node.rejected for node in summary.behind] == [(CLUSTER,)]
    assert summary.behind[0].types[0].message == "no such filter"
    assert bench.sample("router_xds_nacks_total", type="cluster") == 1
    assert bench.sample("router_xds_streams", protocol="delta") == 1


async def test_a_client_that_leaves_is_forgotten_and_may_come_back(bench: Bench) -> None:
    bench.server.set_snapshot(a_snapshot(a=b"\x0a\x01a"))
    client = bench.delta()
    await client.ask(CLUSTER)
    first = await client.hear()
    client.leave()
    await bench.until("disconnected", connected=0)
    assert [(node.id, node.connected) for node in bench.server.fleet.nodes] == [("envoy", False)]
    assert bench.sample("router_xds_streams", protocol="delta") == 0

    again = bench.delta()
    await again.ask(CLUSTER, initial_resource_versions={first.resources[0].name: first.resources[0].version})
    await bench.until("converged", converged=True)


async def test_requests_before_the_first_snapshot_are_answered_when_it_comes(bench: Bench) -> None:
    client = bench.delta()
    await client.ask(CLUSTER)
    await bench.until("connected", connected=1)
    bench.server.set_snapshot(a_snapshot(a=b"\x0a\x01a"))
    assert [r.name for r in (await client.hear()).resources] == ["a"]


async def test_bytes_that_are_no_message_end_the_stream(bench: Bench) -> None:
    client = bench.delta()
    await client._call.write(b"\x0a\xff\x01")
    assert await client.ended() is grpc.StatusCode.INVALID_ARGUMENT


async def test_stopping_closes_streams_at_once(bench: Bench) -> None:
    client = bench.delta()
    await client.ask(CLUSTER)
    await bench.until("connected", connected=1)
    await asyncio.wait_for(bench.server.stop(grace_s=30.0), WAIT_S)
    assert await client.ended() is grpc.StatusCode.OK


async def test_the_socket_is_for_owner_and_group_and_a_live_one_is_not_taken(bench: Bench) -> None:
    assert stat.S_IMODE(bench.path.stat().st_mode) == 0o660
    with pytest.raises(AddressInUse):
        await AdsServer(registry=CollectorRegistry()).start([f"unix:{bench.path}"])


async def test_a_socket_left_behind_is_replaced(tmp_path: Path) -> None:
    with TemporaryDirectory(prefix="ads") as directory:
        bench = Bench(Path(directory) / "xds.sock")
        process = await asyncio.create_subprocess_exec(
            "python3", "-c", f"import socket; socket.socket(socket.AF_UNIX).bind({str(bench.path)!r})"
        )
        await process.wait()
        assert bench.path.exists()
        await bench.server.start([f"unix:{bench.path}", "127.0.0.1:0"])
        await bench.server.stop(0)


async def test_ten_thousand_routes_go_in_pieces_and_an_edit_sends_one(bench: Bench) -> None:
    routes = {f"model/{n}": bytes(1000) for n in range(10_000)}
    bench.server.set_snapshot(a_snapshot(routes=routes))
    client = bench.delta()
    await client.ask(ENDPOINTS)
    await client.ask(ROUTE, resource_names_subscribe=list(routes))
    heard: list[str] = []
    while len(heard) < len(routes):
        response = await client.hear()
        heard += [r.name for r in response.resources]
        await client.ask(ROUTE, response_nonce=response.nonce)
    await bench.until("converged", converged=True)
    bench.server.set_snapshot(a_snapshot(routes={**routes, "model/7": bytes(999)}))
    assert [r.name for r in (await client.hear()).resources] == ["model/7"]
