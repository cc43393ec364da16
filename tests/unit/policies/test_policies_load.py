"""Directories to policies, and the last good one."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from policy_builders import FULL, MINIMAL, a_bundle, loaded, problems, write

from policies.load import (
    Bundle,
    PolicyRejected,
    load,
    load_directory,
    load_last_good,
    load_or_last_good,
    read_bundle,
    save_last_good,
)

MODELS = "models: [{model: m, backends: [{backend_id: a, weight: 1}]}]\n"
BROKEN = "backends: [{id: a, uri: nowhere}]\n" + MODELS


def rejection(directory: Path) -> list[str]:
    with pytest.raises(PolicyRejected) as caught:
        load_directory(directory)
    return [f"{Path(p.place.file).name}:{p.place.line} {p.text}" for p in caught.value.problems]


def test_sample_policy_of_the_repository_loads() -> None:
    found = load_directory(Path(__file__).parents[3] / "policies")
    assert [entry.model for entry in found.policy.models] == ["gpt-4o", "text-embedding-3-small"]
    assert found.warnings == ()


def test_sections_of_several_files_are_joined_in_order_of_names(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "20-chat.yml": MODELS,
            "10-backends.yaml": "backends: [{id: b, uri: http://b}]\ndefault_policy: {ejection: 1s}",
            "15-more.yaml": "backends: [{id: a, uri: http://a}]\nmodels:\n",
            "empty.yaml": "# nothing yet\n",
            ".hidden.yaml": "nonsense",
            "readme.md": "nonsense",
        },
    )
    write(tmp_path / "sub.d", {"x.yaml": "nonsense"})
    policy = load_directory(tmp_path).policy
    assert [backend.id for backend in policy.backends] == ["b", "a"]
    assert policy.default_policy.ejection_s == 1
    assert policy.models[0].place.file == str(tmp_path / "20-chat.yml")


def test_single_sections_may_be_in_one_file_only() -> None:
    assert problems(MINIMAL + "limits: {}", "limits:\n  default: {}", "limits:") == [
        "policies/1.yaml:2 limits: may be in one file only; already in policies/0.yaml:3"
    ]


def test_everything_unreadable_is_told_at_once(tmp_path: Path) -> None:
    write(tmp_path, {"ok.yaml": MINIMAL})
    (tmp_path / "dir.yaml").mkdir()
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "dangling.yaml").symlink_to("nowhere")
    (tmp_path / "latin.yaml").write_bytes(b"a: 1\nb: \xe9\n")
    assert rejection(tmp_path) == [
        "dangling.yaml:1 cannot be read: No such file or directory",
        "dir.yaml:1 cannot be read: Is a directory",
        "latin.yaml:2 is not UTF-8: byte 0xe9",
        "pipe.yaml:1 cannot be read: not a regular file",
    ]


def test_syntax_error_does_not_hide_problems_of_other_files() -> None:
    syntax, shape = problems("backends:\n  - {id: a\nmodels:", "models: [{model: m, backends: x}]")
    assert syntax.startswith("policies/0.yaml:3: YAML: ")
    assert shape == "policies/1.yaml:1 models[0].backends: expected a list, got a scalar"


def test_directory_that_is_none_or_empty_is_rejected(tmp_path: Path) -> None:
    assert rejection(tmp_path / "absent") == ["absent:1 cannot be read: No such file or directory"]
    file = tmp_path / "file"
    file.write_text("")
    assert rejection(file) == ["file:1 cannot be read: Not a directory"]
    assert rejection(write(tmp_path / "empty", {})) == ["empty:1 holds no policy file (*.yaml, *.yml)"]


def test_files_larger_than_the_limit_are_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("policies.source.BUNDLE_MAX_BYTES", 100)
    write(tmp_path, {"a.yaml": MINIMAL, "b.yaml": "#" * 50})
    assert rejection(tmp_path) == ["b.yaml:1 cannot be read: the policy files are larger than 100 bytes"]


def test_endpoints_override_uris_and_add_backends() -> None:
    policy = loaded(FULL, endpoints="openai-eu:http://127.0.0.1:9, extra:http://extra/v1").policy
    openai, extra = policy.backends[0], policy.backends[-1]
    assert openai.uri.authority == "127.0.0.1:9"
    assert openai.model_variant == "gpt-4o-2024-08-06"
    assert (extra.id, extra.uri.path_prefix, extra.place.file) == ("extra", "/v1", "BACKEND_ENDPOINTS")


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("a", "BACKEND_ENDPOINTS:1 [0]: expected id:uri"),
        ("b:http://b,", "BACKEND_ENDPOINTS:1 [1]: expected id:uri"),
        ("a:ftp://b", "BACKEND_ENDPOINTS:1 [0]: expected a URI such as http://host:8000, got 'ftp://b'"),
        ("b:http://b,b:http://c", "BACKEND_ENDPOINTS:1 [1]: duplicate backend id 'b'"),
        (
            "b!:http://b",
            "BACKEND_ENDPOINTS:1 [0].id: 'b!' must be 1 to 63 letters, digits, '.', '_' or '-', "
            "the first a letter or digit",
        ),
    ],
)
def test_endpoints_that_cannot_be_read_are_problems(written: str, expected: str) -> None:
    assert problems(MINIMAL, endpoints=written) == [expected]


def test_digest_names_names_and_texts_and_nothing_else(tmp_path: Path) -> None:
    one = read_bundle(write(tmp_path / "one", {"a.yaml": "x", "b.yaml": "y"}))
    two = read_bundle(write(tmp_path / "two", {"b.yaml": "y", "a.yaml": "x"}))
    assert one.digest == two.digest
    assert len(one.digest) == 64
    others = [{"a.yaml": "xb.yamly"}, {"a.yaml": "y", "b.yaml": "x"}, {"a.yaml": "x", "b.yml": "y"}]
    assert one.digest not in {Bundle.of("", files.items()).digest for files in others}
    assert load(a_bundle(MINIMAL)).policy.digest == a_bundle(MINIMAL).digest


@given(st.dictionaries(st.text(max_size=5), st.text(max_size=20), max_size=4))
def test_last_good_bundle_comes_back(tmp_path_factory: pytest.TempPathFactory, files: dict[str, str]) -> None:
    path = tmp_path_factory.mktemp("state") / "last-good.json"
    bundle = Bundle.of("policies", files.items())
    save_last_good(bundle, path)
    assert load_last_good(path) == bundle


def test_last_good_file_is_private_and_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "state" / "last-good.json"
    save_last_good(a_bundle("one"), path)
    save_last_good(a_bundle(MINIMAL), path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(path.parent) == ["last-good.json"]


def test_last_good_file_survives_a_failed_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last-good.json"
    save_last_good(a_bundle(MINIMAL), path)

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_last_good(a_bundle("two"), path)
    assert os.listdir(tmp_path) == ["last-good.json"]
    assert load_last_good(path) == a_bundle(MINIMAL)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"{}",
        b"\xff",
        b'{"digest": "x", "directory": "d", "files": [["a.yaml"]]}',
        b'{"digest": "x", "directory": "d", "files": [["a.yaml", "b"]]}',
        b'{"digest": "x", "directory": "d", "files": [["a.yaml", "\\ud800"]]}',
        b"[" * 100_000,
    ],
    ids=lambda content: repr(content[:60]),
)
def test_broken_last_good_file_is_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "last-good.json"
    path.write_bytes(content)
    assert load_last_good(path) is None


def test_start_takes_the_directory_when_it_is_good(tmp_path: Path) -> None:
    start = load_or_last_good(write(tmp_path / "p", {"a.yaml": MINIMAL}), "", tmp_path / "absent.json")
    assert start.problems == ()
    assert start.loaded.bundle.files == (("a.yaml", MINIMAL),)


def test_start_takes_the_last_good_when_the_directory_is_bad(tmp_path: Path) -> None:
    state = tmp_path / "last-good.json"
    save_last_good(a_bundle(MINIMAL), state)
    start = load_or_last_good(write(tmp_path / "p", {"a.yaml": BROKEN}), "", state)
    assert start.loaded.policy.digest == a_bundle(MINIMAL).digest
    assert ["expected a URI" in problem.text for problem in start.problems] == [True]


def test_start_is_rejected_with_the_directorys_problems_when_neither_works(tmp_path: Path) -> None:
    directory = write(tmp_path / "p", {"a.yaml": BROKEN})
    state = tmp_path / "last-good.json"
    with pytest.raises(PolicyRejected, match="expected a URI"):
        load_or_last_good(directory, "", state)
    save_last_good(a_bundle("models: []"), state)
    with pytest.raises(PolicyRejected, match="expected a URI"):
        load_or_last_good(directory, "", state)
    state.write_text(json.dumps({}))
    with pytest.raises(PolicyRejected, match="expected a URI"):
        load_or_last_good(directory, "", state)


def test_thousands_of_models_with_the_same_typo_are_told_in_seconds() -> None:
    models = "".join(f"- {{model: m{i}, backends: [{{backend_id: bakend-1, weight: 1}}]}}\n" for i in range(2_000))
    backends = "".join(f"- {{id: backend-{i}, uri: http://b{i}}}\n" for i in range(500))
    assert len(problems(f"backends:\n{backends}models:\n{models}")) == 2_000
