"""Names that two programs share are written in one place."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway import names
from gateway.settings import XDS_SOCKET

ROOT = Path(__file__).parents[3]
PROGRAMS = ("cli", "extproc", "gateway", "mocks", "policies", "usage", "xds", "envoy", "configs", "deploy")
SUFFIXES = {".py", ".yaml", ".yml", ".lua", ".json", ".sh", ".toml"}
NAMES_FILE = ROOT / "gateway" / "names.py"


def product_files() -> Iterator[Path]:
    for program in PROGRAMS:
        for path in sorted((ROOT / program).rglob("*")):
            if path.suffix in SUFFIXES and path != NAMES_FILE and "__pycache__" not in path.parts:
                yield path


@pytest.mark.parametrize("path", list(product_files()), ids=lambda path: str(path.relative_to(ROOT)))
def test_internal_header_is_written_in_names_only(path: Path) -> None:
    lines = enumerate(path.read_text().splitlines(), start=1)
    found = [f"{path.name}:{number}: {line.strip()}" for number, line in lines if "x-router-" in line.lower()]
    assert found == []


def values(prefix: str) -> dict[str, str]:
    return {name: value for name, value in vars(names).items() if name.startswith(prefix) and isinstance(value, str)}


def test_internal_headers_are_those_that_are_stripped() -> None:
    internal = ("ORGANIZATION", "ADMIN", "MODEL", "VARIANT", "MODEL_SPAN", "BACKEND")
    for name in internal:
        assert values("HEADER_")[f"HEADER_{name}"].startswith(names.INTERNAL_HEADER_PREFIX)


def test_headers_are_lower_case_and_differ() -> None:
    headers = list(values("HEADER_").values())
    assert all(re.fullmatch(r"[a-z0-9-]+", header) for header in headers)
    assert len(set(headers)) == len(headers)


def test_clusters_differ_and_no_backend_can_take_their_names() -> None:
    clusters = list(values("CLUSTER_").values())
    clusters.remove(names.CLUSTER_METADATA_BACKEND_ID)
    assert len(set(clusters)) == len(clusters)
    assert not [cluster for cluster in clusters if cluster.startswith(("be_", "bk_"))]
    assert names.entry_cluster("a") != names.backend_cluster("a")


def test_variant_is_the_same_in_every_order() -> None:
    assert names.variant(frozenset({"b", "a"})) == names.variant(frozenset({"a", "b"})) == "a,b"  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def bootstrap() -> dict[str, Any]:
    parsed: dict[str, Any] = yaml.safe_load((ROOT / "envoy" / "bootstrap.yaml").read_text())
    return parsed


def test_bootstrap_knows_the_control_plane_by_its_name(bootstrap: dict[str, Any]) -> None:
    ads = bootstrap["dynamic_resources"]["ads_config"]["grpc_services"]
    assert [service["envoy_grpc"]["cluster_name"] for service in ads] == [names.CLUSTER_XDS]
    [cluster] = bootstrap["static_resources"]["clusters"]
    assert cluster["name"] == cluster["load_assignment"]["cluster_name"] == names.CLUSTER_XDS
    [endpoints] = cluster["load_assignment"]["endpoints"]
    [endpoint] = endpoints["lb_endpoints"]
    assert endpoint["endpoint"]["address"] == {"pipe": {"path": XDS_SOCKET}}


def test_bootstrap_is_the_node_that_everyone_expects(bootstrap: dict[str, Any]) -> None:
    assert bootstrap["node"]["id"] == names.NODE_ID


def test_bootstrap_decides_nothing_that_a_policy_does(bootstrap: dict[str, Any]) -> None:
    assert bootstrap["static_resources"].keys() == {"clusters"}
    assert bootstrap["admin"]["address"]["socket_address"]["address"] == "127.0.0.1"
