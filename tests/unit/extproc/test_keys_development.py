"""Keys that exist without being created, in development only."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.authenticate import authenticate, has_scope
from extproc.keys.development import DEFAULT_ORGANIZATION, DevelopmentKeys
from extproc.keys.open import open_keys
from extproc.keys.record import PresentedKey, fields_of, record_from
from gateway.errors import Reason, Refused
from gateway.settings import ExtprocSettings
from gateway.telemetry import get_logger

UUID = "7c9e6679-7425-40de-944b-e07fc1f90ae7"


@pytest.mark.parametrize(
    ("key", "organization", "principal"),
    [
        (f"dev-{UUID}-alice", UUID, "alice"),
        (f"dev-{UUID.upper()}-alice", UUID, "alice"),
        (f"dev-{UUID}", UUID, ""),
        ("dev-acme-alice", "acme", "alice"),
        ("dev-acme-alice-2", "acme", "alice-2"),
        ("dev-key", DEFAULT_ORGANIZATION, "key"),
        ("test-abc", DEFAULT_ORGANIZATION, "abc"),
        ("test-acme-alice", DEFAULT_ORGANIZATION, "acme-alice"),
    ],
)
def test_key_names_its_organisation(key: str, organization: str, principal: str) -> None:
    record = DevelopmentKeys(environment="development").peek(PresentedKey(key))
    assert record is not None
    assert (record.id, record.organization_id, record.principal_id) == (key, organization, principal)


@pytest.mark.parametrize(
    "key", ["dev-", "test-", "dev", "development-key", "Dev-key", "dev--x", "dev-a/b", "dev-" + "a" * 121, "rk-x"]
)
def test_other_keys_are_no_development_keys(key: str) -> None:
    assert DevelopmentKeys(environment="development").peek(PresentedKey(key)) is None


@given(
    rest=st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=130),
    prefix=st.sampled_from(["dev-", "test-"]),
)
def test_every_development_record_could_be_stored(rest: str, prefix: str) -> None:
    record = DevelopmentKeys(environment="development").peek(PresentedKey(prefix + rest))
    if record is not None:
        assert record_from(fields_of(record)) == record


@pytest.mark.parametrize(("key", "admin"), [("dev-acme-alice", False), ("dev-acme-admin", True), ("dev-admin", True)])
async def test_only_the_name_admin_has_the_admin_scope(key: str, admin: bool) -> None:
    caller = await authenticate(PresentedKey(key), DevelopmentKeys(environment="development"), 0)
    assert has_scope(caller, "admin") is admin
    assert all(has_scope(caller, scope) for scope in ("inference", "models", "audit"))


@pytest.mark.parametrize("environment", ["staging", "production", "", "Development"])
def test_there_are_no_development_keys_elsewhere(environment: str) -> None:
    with pytest.raises(ValueError, match="not for"):
        DevelopmentKeys(environment=environment)


@pytest.mark.parametrize("key", ["dev-acme-alice", "dev-key", "test-abc", f"dev-{UUID}-admin"])
@pytest.mark.parametrize("environment", ["staging", "production"])
async def test_development_key_is_unknown_in_staging_and_production(environment: str, key: str) -> None:
    settings = ExtprocSettings.model_validate({"environment": environment})
    async with open_keys(settings, log=get_logger()) as keys:
        with pytest.raises(Refused) as refused:
            await authenticate(PresentedKey(key), keys.store, 0)
    assert refused.value.reason is Reason.KEY_UNKNOWN


async def test_development_key_is_known_in_development() -> None:
    async with open_keys(ExtprocSettings.model_validate({"environment": "development"}), log=get_logger()) as keys:
        assert (await authenticate(PresentedKey("dev-acme-alice"), keys.store, 0)).organization_id == "acme"
