"""``router policies``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from policy_builders import FULL, MINIMAL, write

from cli.policies import policies


def run(*args: str, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(policies, args, env={"BACKEND_ENDPOINTS": "", **(env or {})})


@pytest.fixture
def good(tmp_path: Path) -> str:
    return str(write(tmp_path / "good", {"router.yaml": FULL}))


@pytest.fixture
def bad(tmp_path: Path) -> str:
    text = MINIMAL.replace("backend_id: a, weight: 1", "backend_id: b, weight: 0")
    return str(write(tmp_path / "bad", {"router.yaml": text}))


def test_check_of_a_good_directory_counts(good: str) -> None:
    result = run("check", good)
    assert result.exit_code == 0
    assert result.output.startswith("ok: 3 backends, 2 models, 0 warnings (digest ")


def test_check_of_a_bad_directory_prints_each_problem_and_fails(bad: str) -> None:
    result = run("check", bad)
    assert result.exit_code == 1
    assert result.output.splitlines() == [
        f"{bad}/router.yaml:2 models[0].backends: weights sum to 0",
        f"{bad}/router.yaml:2 models[0].backends[0].backend_id: unknown backend 'b'",
        "2 problems",
    ]


def test_check_prints_warnings_and_succeeds(tmp_path: Path) -> None:
    directory = write(tmp_path, {"a.yaml": MINIMAL + "kill_switches: [{backend_id: a, enabled: true}]"})
    result = run("check", str(directory))
    assert result.exit_code == 0
    assert f"{directory}/a.yaml:2 models[0].backends: warning: kill switches take every backend\n" in result.output
    assert "1 backend, 1 model, 1 warning" in result.output


def test_check_prints_json(good: str, bad: str) -> None:
    fine, broken = json.loads(run("check", good, "--json").output), run("check", bad, "--json")
    assert (fine["ok"], fine["backends"], fine["models"], fine["problems"]) == (True, 3, 2, [])
    assert broken.exit_code == 1
    assert json.loads(broken.output)["problems"][0] == {
        "file": f"{bad}/router.yaml",
        "line": 2,
        "path": "models[0].backends",
        "text": "weights sum to 0",
    }


def test_check_of_an_absent_directory_is_a_problem() -> None:
    result = run("check", "/nonexistent")
    assert result.exit_code == 1
    assert result.output.startswith("/nonexistent:1: cannot be read: No such file or directory\n")


def test_check_takes_endpoints_from_the_environment(good: str) -> None:
    assert "4 backends" in run("check", good, env={"BACKEND_ENDPOINTS": "extra:http://extra"}).output
    assert run("check", good, "--backend-endpoints", "extra").exit_code == 1


def test_show_prints_shares_and_states(tmp_path: Path) -> None:
    text = """\
backends: [{id: a, uri: http://a}, {id: b, uri: http://b}, {id: c, uri: http://c}, {id: d, uri: http://d}]
models:
  - model: m
    backends:
      - {backend_id: a, weight: 30, deny_list: [k1]}
      - {backend_id: b, weight: 10}
      - {backend_id: c, weight: 40}
      - {backend_id: d, weight: 0}
    degraded_backends: [c]
  - model: n
    backends: [{backend_id: b, weight: 1}, {backend_id: c, weight: 3}]
organization_overrides:
  - {organization_id: acme, reason: contract, backends: [{backend_id: a, weight: 1}]}
kill_switches: [{backend_id: b, enabled: true}]
"""
    directory = str(write(tmp_path, {"a.yaml": text}))
    entries = json.loads(run("show", directory, "--json").output)["entries"]
    shown = [[(row["backend_id"], row["percent"], row["state"]) for row in entry["backends"]] for entry in entries]
    assert shown == [
        [("a", 100.0, "active"), ("b", 0.0, "killed"), ("c", 0.0, "degraded"), ("d", 0.0, "fallback")],
        [("b", 0.0, "killed"), ("c", 100.0, "active")],
        [("a", 100.0, "active")],
    ]
    assert [(entry["override"], entry["reason"]) for entry in entries] == [
        (False, None),
        (False, None),
        (True, "contract"),
    ]
    table = run("show", directory).output
    for part in ("m  organisation *", "100.0 %", "degraded", "killed", "deny k1", "override: contract"):
        assert part in table


def test_show_of_a_bad_directory_fails(bad: str) -> None:
    result = run("show", bad)
    assert result.exit_code == 1
    assert "weights sum to 0" in result.output
