"""How the limit store's server is reached: with passwords, in another database, over TLS; and who is turned away."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any, cast

import pytest

from gateway.errors import StoreUnavailable
from limits.model import Admitted
from tests.harness.limit_load import LIMITS, Load, Log, a_store
from tests.harness.tls import Authority
from tests.harness.valkey import a_forwarder, a_server

pytestmark = pytest.mark.integration


async def admits(address: str, **options: Any) -> bool:
    async with a_store(address, **options) as store:
        try:
            return isinstance(await store.admit(Load(store).demand("x"), LIMITS), Admitted)
        except StoreUnavailable:
            return False


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("redis://router:secret@127.0.0.1:{port}", True),
        ("redis://:other@127.0.0.1:{port}/3", True),
        ("unix://:other@{socket}", True),
        ("unix://:other@{socket}?db=3", True),
        ("redis://router:wrong@127.0.0.1:{port}", False),
        ("127.0.0.1:{port}", False),
    ],
    ids=["a user", "a password and a database", "a socket", "a socket and a database", "wrong", "none"],
)
async def test_password_and_database_of_the_address_are_used(address: str, expected: bool) -> None:
    with a_server(tcp=True) as server:
        server.client.acl_setuser("router", enabled=True, passwords=["+secret"], keys=["router:*"], commands=["+@all"])
        server.client.acl_setuser("default", enabled=True, passwords=["+other"])
        assert await admits(address.format(port=server.port, socket=server.socket)) is expected


async def test_password_is_in_no_log() -> None:
    log = Log()
    with a_server(tcp=True) as server:
        server.client.config_set("requirepass", "right")
        await admits(f"redis://:sesame@127.0.0.1:{server.port}", log=cast(Any, log))
    assert log.events
    assert "sesame" not in str(log.events)


@pytest.mark.parametrize(
    ("query", "host", "expected"),
    [
        ("?ssl_ca_certs={authority}", "localhost", True),
        ("?ssl_ca_certs={authority}", "127.0.0.1", False),
        ("", "localhost", False),
        ("?ssl_cert_reqs=none", "127.0.0.1", True),
    ],
    ids=["trusted", "another name", "unknown authority", "unchecked"],
)
async def test_certificate_is_checked_unless_the_address_says_otherwise(
    tmp_path: Path, query: str, host: str, expected: bool
) -> None:
    authority = Authority(tmp_path, "ours")
    certificate = authority.issue("DNS:localhost")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate.certificate, certificate.key)
    with a_server(tcp=True) as server:
        async with a_forwarder(server.port, tls=context) as forwarder:
            url = f"rediss://{host}:{forwarder.port}/0{query.format(authority=authority.certificate)}"
            assert await admits(url) is expected
