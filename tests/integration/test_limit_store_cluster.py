"""The limit store on a cluster of several nodes: an organisation's keys are on one of them, and calls find it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import pytest

from gateway.errors import StoreUnavailable
from limits.model import Admitted, Denied
from limits.resp import pack
from limits.scripts import ORGANIZATIONS, prefix, slot
from limits.valkey import ValkeyLimits
from policies.model import OrganizationId
from tests.harness.limit_cases import a_budget, limits_for
from tests.harness.limit_load import AT_ONCE_S, LIMITS, Load, a_store
from tests.harness.valkey import Server, a_cluster

pytestmark = pytest.mark.integration

MASTERS = 3


@pytest.fixture(scope="module")
def healthy() -> Iterator[list[Server]]:
    with a_cluster(MASTERS) as servers:
        yield servers


@pytest.fixture
def cluster(healthy: list[Server]) -> list[Server]:
    """One that has forgotten what tests before have done."""
    for server in healthy:
        server.client.flushall()
    return healthy


@pytest.fixture
def mortal() -> Iterator[list[Server]]:
    """One whose last master has a replica."""
    with a_cluster(MASTERS, replicas=1) as servers:
        yield servers


def organizations_on(master: int, count: int = 5) -> list[OrganizationId]:
    """Some whose keys are on that master."""
    every = (OrganizationId(f"org-{number}") for number in range(1000))
    return [org for org in every if slot(prefix(org)) * MASTERS // 16384 == master][:count]


def moved(cluster: list[Server]) -> int:
    """How often a call was sent on to another node."""
    errors = [server.client.info("errorstats").get("errorstat_MOVED", {"count": 0}) for server in cluster]
    return sum(int(error["count"]) for error in errors)


async def admit(store: ValkeyLimits, org: OrganizationId, request_id: str = "r") -> Admitted | Denied:
    admission = await store.admit(Load(store, org=org).demand(request_id), LIMITS)
    assert isinstance(admission, Admitted | Denied)
    return admission


def test_slots_are_the_servers(cluster: list[Server]) -> None:
    for key in ("foo", "{user1000}.following", "foo{}{bar}", "foo{{bar}}zap", "foo{bar}{zap}", "{", "ä", ""):
        assert slot(key.encode()) == cluster[0].cluster("KEYSLOT", key)


async def test_every_call_reaches_the_node_that_has_the_organization(cluster: list[Server]) -> None:
    async with a_store(cluster[0].address) as store:
        organizations = [org for master in range(MASTERS) for org in organizations_on(master)]
        assert [type(await admit(store, org)) for org in organizations] == [Admitted] * len(organizations)
        for master in range(MASTERS):
            entries = {f"router:{{{org}}}:entry:r".encode() for org in organizations_on(master)}
            assert set(cluster[master].client.scan_iter("router:*:entry:*", count=1000)) == entries
        assert await store.organizations() == tuple(sorted(organizations))
        for org in organizations:
            await store.set_budget(org, "org", "DAILY", "tokens", 100)
            first, *_ = await store.look(org, LIMITS)
            assert first.remaining == 0
            assert isinstance(await admit(store, org, "s"), Denied)
            assert await store.overdue(org, most=9) == ()
            assert len(await store.reset(org, ["org"])) == 2
            assert (await store.settle(Load(store, org=org).settlement("r"))).outcome == "settled"
            assert (await store.expire(org, "r")).outcome == "repeated"


async def test_only_the_first_call_of_an_organization_is_sent_on(cluster: list[Server]) -> None:
    async with a_store(cluster[0].address) as store:
        organizations = [org for master in range(MASTERS) for org in organizations_on(master)]
        await asyncio.gather(*(admit(store, org) for org in organizations))
        before = moved(cluster)
        assert before
        for number in range(20):
            await asyncio.gather(*(admit(store, org, f"r-{number}") for org in organizations))
        assert moved(cluster) == before


async def test_plain_calls_on_the_connection_are_sent_on_too(cluster: list[Server]) -> None:
    async with a_store(cluster[0].address) as store:
        for key in (b"router:audit", ORGANIZATIONS, *(f"k-{number}".encode() for number in range(20))):
            assert await store.connection.call(pack(b"SADD", key, b"1")) == 1
            assert await store.connection.call(pack(b"SCARD", key)) == 1


async def test_slot_that_moves_is_followed(cluster: list[Server]) -> None:
    (org,) = organizations_on(1, 1)
    async with a_store(cluster[0].address) as store:
        assert isinstance(await admit(store, org, "before"), Admitted)
        cluster[1].client.delete(*cluster[1].client.scan_iter(prefix(org) + b"*"))
        for server in (cluster[2], cluster[1], cluster[0]):
            server.cluster("SETSLOT", slot(prefix(org)), "NODE", cluster[2].cluster("MYID"))
        assert isinstance(await admit(store, org, "after"), Admitted)
        assert cluster[2].client.exists(prefix(org) + b"entry:after")
        cluster[2].client.flushall()
        for server in (cluster[1], cluster[2], cluster[0]):
            server.cluster("SETSLOT", slot(prefix(org)), "NODE", cluster[1].cluster("MYID"))
        assert isinstance(await admit(store, org, "back"), Admitted)
        assert cluster[1].client.exists(prefix(org) + b"entry:back")


async def test_node_that_dies_fails_its_organizations_at_once_and_no_others(mortal: list[Server]) -> None:
    (dead,), (alive,) = organizations_on(2, 1), organizations_on(1, 1)
    changes: list[bool] = []
    async with a_store(mortal[0].address, on_change=changes.append) as store:
        for org in (dead, alive):
            await admit(store, org)
        for server in mortal[2:]:
            await asyncio.to_thread(server.kill)
        taken_s = []
        for number in range(50):
            assert isinstance(await admit(store, alive, f"a-{number}"), Admitted)
            began_s = time.monotonic()
            with pytest.raises(StoreUnavailable):
                await admit(store, dead, f"d-{number}")
            taken_s.append(time.monotonic() - began_s)
        assert sorted(taken_s)[40] < AT_ONCE_S
        assert changes == [True]
        assert isinstance(await admit(store, alive, "last"), Admitted)


async def test_replica_of_a_node_that_dies_takes_over(mortal: list[Server]) -> None:
    (org,) = organizations_on(2, 1)
    master, replica = mortal[2], mortal[3]
    async with a_store(mortal[0].address) as store:
        async with Load(store, org=org).running() as load:
            await load.more(200)
            await asyncio.to_thread(master.kill)
            await load.fail_at_once(50)
            replica.cluster("FAILOVER", "TAKEOVER")
            await load.more(200)
        await load.everything_counts_once()


async def test_budget_holds_on_a_cluster(cluster: list[Server]) -> None:
    (org,) = organizations_on(1, 1)
    limits = limits_for("org", budgets=(a_budget("DAILY", "micro_usd", 37_000),))
    async with a_store(cluster[0].address) as first, a_store(cluster[1].address) as second:
        admissions = await asyncio.gather(
            *(
                store.admit(Load(store, org=org).demand(f"{name}-{number}"), limits)
                for name, store in (("a", first), ("b", second))
                for number in range(100)
            )
        )
        assert [type(each) for each in admissions].count(Admitted) == 37
