"""Settings: environment over file over default, and errors that name the variable."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from cli.up_settings import UpSettings
from gateway.settings import CommonSettings, ExtprocSettings, SettingsError, UsageSettings, XdsSettings, read

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of the machine's own."""
    for settings in (ExtprocSettings, XdsSettings, UsageSettings):
        for name in settings.model_fields:
            monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.delenv("ROUTER_CONFIG", raising=False)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def write(**values: Any) -> None:
        path = tmp_path / "router.yaml"
        path.write_text(yaml.safe_dump(values))
        monkeypatch.setenv("ROUTER_CONFIG", str(path))

    return write


def test_defaults_are_those_of_the_contract() -> None:
    xds = read(XdsSettings)
    assert (xds.service_name, xds.environment) == ("api-router-service", "development")
    assert (xds.http_port, xds.admin_port, xds.admin_host) == (8080, 8081, "127.0.0.1")
    assert (xds.inference_payload_max_bytes, xds.body_max_bytes) == (65_536, 8 * 1024 * 1024)
    extproc = read(ExtprocSettings)
    assert (extproc.key_cache_ttl_s, extproc.key_cache_negative_ttl_s) == (60.0, 5.0)


def test_file_wins_over_defaults_and_environment_over_the_file(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config(http_port=9000, admin_port=9001)
    monkeypatch.setenv("HTTP_PORT", "7000")
    settings = read(XdsSettings)
    assert (settings.http_port, settings.admin_port, settings.xds_grpc_address) == (7000, 9001, "")


def test_empty_variable_is_no_variable(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config(http_port=9000)
    monkeypatch.setenv("HTTP_PORT", "")
    assert read(XdsSettings).http_port == 9000


def test_names_of_variables_do_not_depend_on_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENVIRONMENT", "production")
    assert read(ExtprocSettings).environment == "production"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HTTP_PORT", "0"),
        ("HTTP_PORT", "70000"),
        ("HTTP_PORT", "http"),
        ("ENVIRONMENT", "prod"),
        ("EXTPROC_WORKERS", "0"),
        ("BODY_MAX_BYTES", "-1"),
        ("LOG_LEVEL", "loud"),
    ],
)
def test_wrong_value_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=rf"^{name}: .*got '{value}'"):
        read(XdsSettings)


def test_every_wrong_value_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PORT", "x")
    monkeypatch.setenv("ADMIN_PORT", "y")
    with pytest.raises(SettingsError) as raised:
        read(XdsSettings)
    assert [line.partition(":")[0] for line in str(raised.value).splitlines()] == ["HTTP_PORT", "ADMIN_PORT"]


def test_file_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROUTER_CONFIG", "/nowhere/router.yaml")
    with pytest.raises(SettingsError, match=r"^ROUTER_CONFIG: /nowhere/router\.yaml is not a file$"):
        read(XdsSettings)


def test_settings_do_not_change() -> None:
    settings = read(CommonSettings)
    with pytest.raises(ValueError, match="frozen"):
        settings.environment = "production"


def test_sample_config_says_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = ROOT / "configs" / "router.sample.yaml"
    programs = (XdsSettings, ExtprocSettings, UsageSettings, UpSettings)
    known = {field for settings in programs for field in settings.model_fields}
    assert set(yaml.safe_load(sample.read_text()) or {}) <= known
    monkeypatch.setenv("ROUTER_CONFIG", str(sample))
    for settings in programs:
        read(settings)


def test_worker_sockets_differ() -> None:
    settings = read(CommonSettings)
    assert len({settings.worker_socket(worker) for worker in range(64)}) == 64
