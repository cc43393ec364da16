"""A provider credential in a file: injected by Envoy, and rotated without an edit of the policy or a broken request."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.process import eventually
from tests.harness.stack import Stack, running_stack

pytestmark = pytest.mark.integration

CALL = {"model": "gpt-4o", "prompt": "hi"}


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    (tmp_path / "key").write_text("first\n")
    credential = {"credential": {"file": str(tmp_path / "key")}}
    with running_stack(mocks=("a",), workers=1, backend=credential) as running:
        yield running


def test_a_rotated_credential_is_used_and_no_cluster_changes(stack: Stack, tmp_path: Path) -> None:
    statuses = set()

    def credential_seen() -> str | None:
        stack.mocks["a"].clear()
        with stack.client() as client:
            statuses.add(client.post("/v1/completions", json=CALL).status_code)
        [received] = stack.mocks["a"].requests()
        return received.header("authorization")

    assert credential_seen() == "Bearer first"
    updates = stack.stats("cluster_manager.cluster_modified")
    (tmp_path / "key.new").write_text("second\n")
    (tmp_path / "key.new").rename(tmp_path / "key")
    eventually(lambda: credential_seen() == "Bearer second", "the new credential is in use", within_s=10)
    assert statuses == {200}
    assert stack.stats("cluster_manager.cluster_modified") == updates
    for process in stack.processes:
        assert "second" not in process.log()


def test_a_credential_file_that_vanishes_leaves_the_last_one_in_force(stack: Stack, tmp_path: Path) -> None:
    (tmp_path / "key").unlink()
    eventually(lambda: stack.xds_status()["problems"], "the problem is known")
    assert "cannot be read" in stack.xds_status()["problems"][0]
    with stack.client() as client:
        assert client.post("/v1/completions", json=CALL).status_code == 200
    assert stack.mocks["a"].requests()[-1].header("authorization") == "Bearer first"
