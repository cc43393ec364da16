"""What happens to the limit store's callers when its server dies, hangs, forgets, moves or is not there yet."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import uvloop

from gateway.errors import StoreUnavailable
from limits.model import Admitted
from tests.harness.limit_load import AT_ONCE_S, DEADLINE_S, LATE_S, LIMITS, Load, Log, a_store, until
from tests.harness.process import free_ports
from tests.harness.valkey import Server, a_directory, a_forwarder, a_server

pytestmark = pytest.mark.integration


@pytest.fixture
def server() -> Iterator[Server]:
    """It keeps what it has answered."""
    with a_server(options=("--appendonly", "yes")) as running:
        yield running


@pytest.fixture
def directory() -> Iterator[Path]:
    with a_directory() as path:
        yield path


async def in_thread(work: Any) -> None:
    await asyncio.to_thread(work)


async def test_server_that_is_killed_under_load_and_comes_back_counts_everything_once(server: Server) -> None:
    async with a_store(server.address) as store, Load(store).running() as load:
        for _ in range(3):
            await load.more(300)
            await in_thread(server.kill)
            await until(lambda: not store.connection.is_up, "the store is known to be down")
            await load.fail_at_once(200)
            await in_thread(server.start)
            await load.more(300)
    assert load.slowest_s < LATE_S
    async with a_store(server.address) as store:
        load._store = store
        await load.everything_counts_once()


async def test_scripts_that_are_flushed_under_load_are_sent_again_unnoticed(server: Server) -> None:
    async with a_store(server.address) as store:
        async with Load(store).running() as load:
            for _ in range(30):
                await load.more(20)
                await in_thread(server.client.script_flush)
        assert load.failed == []
        await load.everything_counts_once()
    assert load.slowest_s < LATE_S


async def test_replica_takes_over_behind_the_same_address(directory: Path) -> None:
    ports = free_ports(2)
    at_once = ("--repl-diskless-sync-delay", "0")
    master = Server(directory, port=ports[0], name="m", options=at_once)
    replica = Server(directory, port=ports[1], name="r")
    try:
        master.start()
        replica.start()
        replica.client.replicaof("127.0.0.1", master.port)
        async with a_forwarder(master.port) as forwarder, a_store(forwarder.address) as store:
            async with Load(store).running() as load:
                await until(lambda: replica.client.info("replication")["master_link_status"] == "up", "it follows")
                await load.more(300)
                await in_thread(master.kill)
                forwarder.move(replica.port)  # before it was promoted: it takes no writes
                await until(lambda: not store.connection.is_up, "the store is known to be down")
                await load.fail_at_once(100)
                replica.client.replicaof("NO", "ONE")
                await load.more(300)
            assert load.slowest_s < LATE_S
            await load.everything_counts_once()
    finally:
        master.kill()
        replica.kill()


async def test_master_that_is_demoted_is_left_for_the_one_that_took_its_address(directory: Path) -> None:
    ports = free_ports(2)
    old, new = Server(directory, port=ports[0], name="o"), Server(directory, port=ports[1], name="n")
    try:
        old.start()
        new.start()
        async with a_forwarder(old.port) as forwarder, a_store(forwarder.address) as store:
            async with Load(store).running() as load:
                await load.more(100)
                forwarder.target_port = new.port  # connections to the old one stay
                old.client.replicaof("127.0.0.1", new.port)
                await until(lambda: forwarder.connections > 1, "it is connected anew")
                await load.more(300)
            assert load.slowest_s < LATE_S
            await load.everything_counts_once()
    finally:
        old.kill()
        new.kill()


@pytest.mark.parametrize("slow", ["network", "server", "paused"])
async def test_slow_server_costs_one_deadline_and_then_nothing_until_it_is_quick_again(slow: str) -> None:
    with a_server(tcp=True) as server:
        async with a_forwarder(server.port) as forwarder, a_store(forwarder.address) as store:
            async with Load(store).running() as load:
                await load.more(100)
                if slow == "network":
                    forwarder.delay_s = 2 * DEADLINE_S
                elif slow == "server":
                    server.freeze()
                else:
                    server.client.client_pause(1500, all=True)  # it ends by itself
                await until(lambda: not store.connection.is_up, "the store is known to be down")
                await load.fail_at_once(200)
                forwarder.delay_s = 0.0
                if slow == "server":
                    server.thaw()
                await load.more(300)
            assert load.slowest_s < LATE_S
            await load.everything_counts_once()


async def test_server_that_hangs_is_known_before_anybody_calls() -> None:
    with a_server() as server:
        async with a_store(server.address) as store:
            assert store.connection.is_up
            server.freeze()
            await until(lambda: not store.connection.is_up, "the store is known to be down")
            server.thaw()
            await until(lambda: store.connection.is_up, "the store is known to be up")


async def test_server_that_is_not_there_at_the_start_is_used_as_soon_as_it_is(directory: Path) -> None:
    server = Server(directory)
    changes: list[bool] = []
    try:
        began_s = time.monotonic()
        async with a_store(server.address, on_change=changes.append) as store:
            assert time.monotonic() - began_s < LATE_S
            load = Load(store)
            for _ in range(50):
                began_s = time.monotonic()
                with pytest.raises(StoreUnavailable):
                    await store.admit(load.demand("nobody"), LIMITS)
                assert time.monotonic() - began_s < AT_ONCE_S
            await in_thread(server.start)
            async with load.running():
                await load.more(50)
            await load.everything_counts_once()
        assert changes == [True, False]
    finally:
        server.kill()


async def test_outage_is_logged_once_and_its_end(server: Server) -> None:
    log = Log()
    async with a_store(server.address, log=cast(Any, log)) as store:
        await in_thread(server.kill)
        await until(lambda: not store.connection.is_up, "the store is known to be down")
        for _ in range(20):
            with pytest.raises(StoreUnavailable):
                await store.admit(Load(store).demand("x"), LIMITS)
        await asyncio.sleep(0.3)  # some attempts to connect
        await in_thread(server.start)
        await until(lambda: store.connection.is_up, "the store is up")
        events = [event for event, _ in log.events]
    assert events[0] == "limit_store_up"
    assert events[-1] == "limit_store_up"
    assert events.count("limit_store_up") == 2
    assert 1 <= events.count("limit_store_down") <= 3  # once for each reason that differs


async def test_callers_that_leave_mix_up_no_answers(server: Server) -> None:
    async with a_store(server.address) as store:
        load = Load(store)
        for turn in range(60):
            leaving = asyncio.create_task(store.admit(load.demand(f"l-{turn}"), LIMITS))
            for _ in range(turn % 6):
                await asyncio.sleep(0)
            leaving.cancel()
            staying = await asyncio.gather(*(store.admit(load.demand(f"s-{turn}-{n}"), LIMITS) for n in range(3)))
            assert [type(each) for each in staying] == [Admitted] * 3
            assert (await store.settle(load.settlement(f"s-{turn}-0"))).outcome == "settled"
            await asyncio.gather(leaving, return_exceptions=True)
            load.asked += [f"l-{turn}", *(f"s-{turn}-{n}" for n in range(3))]
        await load.everything_counts_once()


async def test_held_up_loop_is_no_slow_server(server: Server) -> None:
    log = Log()

    async def held_up() -> None:
        reading, writing = socket.socketpair()

        def hold_up() -> None:
            reading.recv(1)
            time.sleep(1.5 * DEADLINE_S)

        asyncio.get_running_loop().add_reader(reading, hold_up)
        async with a_store(server.address, log=cast(Any, log)) as store:
            load = Load(store)
            for number in range(5):
                calls = [asyncio.create_task(store.admit(load.demand(f"r-{number}-{n}"), LIMITS)) for n in range(5)]
                await asyncio.sleep(0)
                writing.send(b"x")  # what is read first holds up what is read next, and timers come before that
                assert [type(each) for each in await asyncio.gather(*calls)] == [Admitted] * 5
            assert [event for event, _ in log.events] == ["limit_store_up"]
        asyncio.get_running_loop().remove_reader(reading)
        reading.close()
        writing.close()

    await in_thread(lambda: uvloop.run(held_up()))  # as the programs run


async def test_connection_that_breaks_under_load_fails_no_admission(server: Server) -> None:
    async with a_store(server.address) as store:
        load = Load(store)
        for turn in range(30):
            ids = [f"r-{turn}-{n}" for n in range(20)]
            load.asked += ids
            calls = [asyncio.create_task(store.admit(load.demand(request_id), LIMITS)) for request_id in ids]
            await asyncio.sleep(0)
            await in_thread(lambda: server.client.client_kill_filter(_type="normal", skipme=True))
            assert [type(each) for each in await asyncio.gather(*calls)] == [Admitted] * 20
            await until(lambda: store.connection.is_up, "it is connected anew")
        await load.everything_counts_once()


async def test_organizations_are_told_again_to_a_server_that_has_forgotten_them() -> None:
    with a_server() as server:
        async with a_store(server.address) as store:
            for request_id in ("before", "after"):
                await store.admit(Load(store).demand(request_id), LIMITS)
                assert await store.organizations() == ("acme",)
                await in_thread(server.kill)
                await in_thread(server.start)
                await until(lambda: store.connection.is_up, "it is connected anew")
                assert await store.organizations() == ()


async def test_server_that_answers_nonsense_is_none(server: Server) -> None:
    async def talk(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await writer.drain()
        writer.close()

    listening = await asyncio.start_server(talk, "127.0.0.1", 0)
    async with listening, a_store(f"127.0.0.1:{listening.sockets[0].getsockname()[1]}") as store:
        assert not store.connection.is_up
        with pytest.raises(StoreUnavailable):
            await store.admit(Load(store).demand("x"), LIMITS)


async def test_errors_of_the_server_reach_the_caller_and_the_connection_stays(server: Server) -> None:
    log = Log()
    async with a_store(server.address, log=cast(Any, log)) as store:
        load = Load(store)
        server.client.config_set("maxmemory", 1)
        for _ in range(3):
            with pytest.raises(StoreUnavailable, match="OOM"):
                await store.admit(load.demand("x"), LIMITS)
        assert store.connection.is_up
        assert [event for event, _ in log.events] == ["limit_store_up", "limit_store_refused"]
        server.client.config_set("maxmemory", 0)
        assert isinstance(await store.admit(load.demand("x"), LIMITS), Admitted)


async def test_closing_the_store_ends_calls_and_leaves_no_task(server: Server) -> None:
    before = asyncio.all_tasks()
    async with a_store(server.address) as store:
        server.freeze()
        call = asyncio.create_task(store.admit(Load(store).demand("x"), LIMITS))
        await asyncio.sleep(0)
    with pytest.raises(StoreUnavailable):
        await call
    assert asyncio.all_tasks() == before
    with pytest.raises(StoreUnavailable):
        await store.admit(Load(store).demand("y"), LIMITS)
    server.thaw()
