"""What the scripts of the limit store cost on a server that holds much, against one that holds little."""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from limits.admission import admit_command, caller_part, organization_part
from limits.commands import settle_command
from limits.model import Settlement
from limits.scripts import SCRIPTS
from policies.limits import SubjectLimits
from policies.model import Budget, OrganizationId
from tests.harness.limit_cases import a_demand, limits_of
from tests.harness.valkey import Server, a_server

GROWTH_MAX = 2.5
"""More than memory that is further away, less than anything that is looked through: that would be hundreds of times."""
FEW = 10
ROUNDS, CALLS = 11, 200
ENOUGH = 10**9
BUDGETS = tuple(Budget(period=p, limit_micro_usd=10**15, limit_tokens=10**15) for p in ("DAILY", "MONTHLY"))
LIMITS = limits_of(
    SubjectLimits(
        subject="org",
        requests_per_second=ENOUGH,
        burst=ENOUGH,
        tokens_per_minute=10**12,
        max_parallel=ENOUGH,
        budgets=BUDGETS,
    ),
    SubjectLimits(subject="key/k1", requests_per_second=ENOUGH, burst=ENOUGH, max_parallel=ENOUGH),
)
CALLER = caller_part(LIMITS)

Choice = Callable[[], OrganizationId]
_ids = itertools.count()


def admissions(organizations: Sequence[OrganizationId]) -> tuple[list[bytes], list[bytes]]:
    """Commands that admit a request for each, and commands that settle them."""
    admit, settle = [], []
    for org in organizations:
        demand = a_demand(org, request_id=f"00000000-0000-4000-8000-{next(_ids):012d}")
        admit.append(admit_command(organization_part(org, mode=b"admit"), demand, CALLER, overdue_ms=900_000))
        settle.append(
            settle_command(Settlement(request_id=demand.request_id, organization_id=org, tokens=50, micro_usd=500))
        )
    return admit, settle


def usec_of(server: Server, commands: list[bytes], expected: bytes) -> float:
    server.forget_statistics()
    assert {reply[0] for reply in server.send(commands)} == {expected}
    return server.usec_per_call()


def growth(small: tuple[Server, Choice], large: tuple[Server, Choice]) -> tuple[float, float]:
    """How many times more an admission and a settlement take on the larger one: medians of rounds in turn."""
    taken: dict[tuple[str, int], list[float]] = {}
    for _ in range(ROUNDS):
        for number, (server, choose) in enumerate((small, large)):
            admit, settle = admissions([choose() for _ in range(CALLS)])
            taken.setdefault(("admit", number), []).append(usec_of(server, admit, b"OK"))
            taken.setdefault(("settle", number), []).append(usec_of(server, settle, b"SETTLED"))
    medians = {key: statistics.median(values) for key, values in taken.items()}
    return medians["admit", 1] / medians["admit", 0], medians["settle", 1] / medians["settle", 0]


@contextmanager
def two_servers() -> Iterator[tuple[Server, Server]]:
    """Servers that know the scripts."""
    with a_server() as small, a_server() as large:
        for server in (small, large):
            for script in SCRIPTS:
                server.client.script_load(script.source)
        yield small, large


def growth_with_organizations(many: int) -> tuple[float, float]:
    """See :func:`growth`: so many organisations that have each a request open, against a few."""
    with two_servers() as servers:
        known = [[OrganizationId(f"org-{number}") for number in range(count)] for count in (FEW, many)]
        for server, organizations in zip(servers, known, strict=True):
            server.send(admissions(organizations)[0])
        assert servers[1].client.dbsize() > many > servers[0].client.dbsize()
        chance = random.Random(many)
        return growth((servers[0], lambda: chance.choice(known[0])), (servers[1], lambda: chance.choice(known[1])))


def growth_with_open_reservations(many: int) -> tuple[float, float]:
    """See :func:`growth`: an organisation that has so many requests open, against one that has a few."""
    org = OrganizationId("acme")
    with two_servers() as servers:
        for server, count in zip(servers, (FEW, many), strict=True):
            server.send(admissions([org] * count)[0])
            assert server.client.zcard("router:{acme}:open") == count
        return growth((servers[0], lambda: org), (servers[1], lambda: org))


def growth_with_budgets_set(many: int) -> tuple[float, float]:
    """See :func:`growth`: an organisation in which so many other keys have budgets of their own, against a few."""
    org = OrganizationId("acme")
    with two_servers() as servers:
        for server, count in zip(servers, (FEW, many), strict=True):
            server.client.hset("router:{acme}:budgets", mapping={f"key/x-{n}:DAILY:tokens": n for n in range(count)})
        return growth((servers[0], lambda: org), (servers[1], lambda: org))
