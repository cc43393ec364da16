"""From the policy directory to the served snapshot, on real files and without a network."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from gateway.settings import LAST_GOOD_FILE, XdsSettings
from gateway.telemetry import get_logger
from policies.model import PolicyRejected
from xds.publish import Publisher
from xds.server import AdsServer

POLICY = """
backends:
  - {id: a, uri: "http://127.0.0.1:8001", credential: {env: A_KEY}}
models:
  - {model: gpt-4o, organization_id: "*", backends: [{backend_id: a, weight: 1}]}
"""


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> XdsSettings:
    monkeypatch.setenv("A_KEY", "secret-of-a")
    policy_dir = tmp_path / "policies"
    policy_dir.mkdir()
    (policy_dir / "router.yaml").write_text(POLICY)
    (tmp_path / "run").mkdir()
    return XdsSettings(policy_dir=policy_dir, run_dir=tmp_path / "run")


def publisher(settings: XdsSettings) -> tuple[Publisher, AdsServer]:
    server = AdsServer(registry=CollectorRegistry())
    return Publisher(settings, server, log=get_logger()), server


def test_start_publishes_and_remembers(settings: XdsSettings) -> None:
    publishing, server = publisher(settings)
    publishing.start()
    assert server.snapshot is not None
    assert publishing.status is not None
    assert (publishing.status.source, publishing.status.problems) == ("policy_dir", ())
    assert (settings.state_path / LAST_GOOD_FILE).is_file()


def test_the_same_policy_has_the_same_version(settings: XdsSettings) -> None:
    versions = []
    for _ in range(2):
        publishing, server = publisher(settings)
        publishing.start()
        assert server.snapshot is not None
        versions.append(server.snapshot.version)
    assert versions[0] == versions[1]


def test_a_credential_that_is_not_set_is_a_problem_that_names_file_and_variable(
    settings: XdsSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("A_KEY")
    publishing, _ = publisher(settings)
    with pytest.raises(PolicyRejected, match=r"router\.yaml:3.*A_KEY is not set"):
        publishing.start()


def test_a_broken_directory_without_a_last_good_policy_is_refused(settings: XdsSettings) -> None:
    (settings.policy_dir / "router.yaml").write_text("models: 5\n")
    publishing, server = publisher(settings)
    with pytest.raises(PolicyRejected, match=r"router\.yaml:1"):
        publishing.start()
    assert server.snapshot is None


def test_a_broken_directory_with_a_last_good_policy_serves_that(settings: XdsSettings) -> None:
    first, _ = publisher(settings)
    first.start()
    (settings.policy_dir / "router.yaml").write_text("models: 5\n")
    second, server = publisher(settings)
    second.start()
    assert server.snapshot is not None
    assert second.status is not None
    assert second.status.source == "last_good"
    assert "router.yaml:1" in second.status.problems[0]


def test_a_state_directory_that_cannot_be_written_stops_nothing(settings: XdsSettings) -> None:
    (settings.state_path / LAST_GOOD_FILE).mkdir()
    publishing, server = publisher(settings)
    publishing.start()
    assert server.snapshot is not None


def test_an_edit_encodes_only_what_it_changed(settings: XdsSettings) -> None:
    publishing, server = publisher(settings)
    publishing.start()
    before = server.snapshot
    assert before is not None
    edited = POLICY.replace("gpt-4o", "gpt-4.1")
    (settings.policy_dir / "router.yaml").write_text(edited)
    publishing.start()
    after = server.snapshot
    assert after is not None
    changed = {
        (type_url, name)
        for type_url, named in after.resources.items()
        for name, resource in named.items()
        if before.of(type_url).get(name) != resource
    }
    assert {name for _, name in changed} == {"model/gpt-4.1"}
