"""What is checked before anything starts, and the settings' sample."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

import pytest
import yaml

from cli import preflight, stack
from cli.preflight import PortUse
from cli.readiness import http_ok, sockets_accept
from cli.up_settings import UpSettings
from gateway.settings import CommonSettings, ExtprocSettings, SettingsError, UsageSettings, XdsSettings, read

SAMPLE = Path(__file__).parents[3] / "configs" / "router.sample.yaml"
SETTINGS: tuple[type[CommonSettings], ...] = (ExtprocSettings, XdsSettings, UsageSettings, UpSettings)


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for settings in SETTINGS:
        for name in settings.model_fields:
            monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.delenv("ROUTER_CONFIG", raising=False)


def test_taken_ports_are_all_told_with_their_variables() -> None:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        ports = [server.getsockname()[1] for server in (one, two)]
        with pytest.raises(SettingsError) as refused:
            preflight.check_ports(
                [
                    PortUse(variable="HTTP_PORT", host="0.0.0.0", port=ports[0]),
                    PortUse(variable="ADMIN_PORT", host="127.0.0.1", port=ports[1]),
                ]
            )
    lines = str(refused.value).splitlines()
    assert lines[0] == "nothing was started"
    assert lines[1].startswith(f"HTTP_PORT: port {ports[0]} on 0.0.0.0: address already in use")
    assert lines[2].startswith(f"ADMIN_PORT: port {ports[1]} on 127.0.0.1: address already in use")


def test_one_port_for_two_variables_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    uses = [PortUse(variable=name, host="127.0.0.1", port=port) for name in ("HTTP_PORT", "ADMIN_PORT")]
    with pytest.raises(SettingsError, match=f"ADMIN_PORT: port {port} is also HTTP_PORT's"):
        preflight.check_ports(uses)


def test_run_directory_with_too_long_a_path_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/tmp")
    wanted = tmp_path / ("x" * 100)
    short = preflight.run_directory(wanted)
    try:
        assert len(os.fsencode(short / preflight.LONGEST_SOCKET)) <= preflight.SOCKET_PATH_MAX_BYTES
        assert preflight.run_directory(wanted) == short
        assert short.stat().st_mode & 0o777 == 0o700
    finally:
        short.rmdir()


def test_run_directory_is_where_it_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = preflight.run_directory(Path("r"))
    assert path.is_dir()
    assert path == (tmp_path / "r" if len(str(tmp_path)) < 80 else path)


def test_second_holder_of_a_run_directory_is_refused(tmp_path: Path) -> None:
    with (
        preflight.run_lock(tmp_path),
        pytest.raises(SettingsError, match=rf"already runs in {tmp_path} \(process {os.getpid()}\)"),
        preflight.run_lock(tmp_path),
    ):
        pass
    with preflight.run_lock(tmp_path):
        pass


def test_sample_names_every_setting_and_nothing_else() -> None:
    named = re.findall(r"^(?:# )?([a-z0-9_]+):.*# \S", SAMPLE.read_text(), flags=re.MULTILINE)
    known = {name for settings in SETTINGS for name in settings.model_fields}
    assert sorted(named) == sorted(known)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: s.__name__)
def test_sample_holds_the_defaults(settings: type[CommonSettings], monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = read(settings)
    monkeypatch.setenv("ROUTER_CONFIG", str(SAMPLE))
    assert read(settings) == defaults


def test_sample_leaves_out_only_what_depends_on_the_machine() -> None:
    known = {name for settings in SETTINGS for name in settings.model_fields}
    assert known - set(yaml.safe_load(SAMPLE.read_text())) == {"extproc_workers", "envoy_concurrency"}


def test_moved_mock_backends_are_told_to_the_programs(tmp_path: Path) -> None:
    moved = UpSettings(mock_backend_2_port=9002, backend_endpoints="other:http://h:1")
    told = stack.environment(moved, tmp_path)["BACKEND_ENDPOINTS"]
    assert told == "other:http://h:1,mock-backend-2:http://127.0.0.1:9002"
    assert stack.environment(UpSettings(), tmp_path)["BACKEND_ENDPOINTS"] == ""
    assert stack.environment(UpSettings(mocks=False, mock_backend_1_port=1), tmp_path)["BACKEND_ENDPOINTS"] == ""


def test_given_redis_means_no_valkey(tmp_path: Path) -> None:
    assert stack.programs(UpSettings(), tmp_path)[0].name == "valkey"
    programs = stack.programs(UpSettings(redis_addr="redis://r:6379", mocks=False), tmp_path)
    assert [program.name for program in programs] == ["xds", "extproc", "usage", "envoy"]
    assert programs[0].environment["REDIS_ADDR"] == "redis://r:6379"


async def test_probes_say_why_not(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    why = await http_ok("127.0.0.1", port, "/health")()
    assert why
    assert why.startswith(f"GET http://127.0.0.1:{port}/health: ")
    why = await sockets_accept(tmp_path / "no.sock")()
    assert why
    assert "No such file" in why
