"""Files to values: what each field accepts, and how a problem is told."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_builders import FULL, MINIMAL, loaded, problems

from policies.model import BackendUri, Budget, Credential, HealthCheck, LimitPolicy, Place, Price, Problem, StoreErrors
from policies.nodes import Cursor, Mapping, Node, Scalar, Sequence, Wrong, line_of
from policies.parse import parse, parse_endpoints
from policies.scalars import duration_or_zero_s, integer, micro_usd, name, uri

HERE = Place(file="test.yaml", line=1)


def at(text: str, *, quoted: bool = False) -> Cursor:
    return Cursor(node=Scalar(text=text, quoted=quoted, place=HERE), path="field", problems=[])


def test_full_example_becomes_values() -> None:
    policy = loaded(FULL).policy
    openai, vllm, spare = policy.backends
    assert openai.uri == BackendUri(scheme="https", host="api.openai.example", port=8443, path_prefix="/eu/v2")
    assert openai.timeout_s == 90
    assert openai.health_check == HealthCheck(path="/health?deep=1", interval_s=0.5, timeout_s=0.25)
    assert openai.credential == Credential(env="PROVIDER_KEY", header="authorization", prefix="Bearer ")
    assert openai.price == Price(
        input_micro_usd_per_1k=5_000,
        output_micro_usd_per_1k=15_000,
        cached_input_micro_usd_per_1k=2_500,
        reasoning_micro_usd_per_1k=20_000,
    )
    assert openai.labels == (("odd label", "1.0"), ("region", "eu-west-1"), ("tier", "gold"), ("version", "1.10"))
    assert vllm.price == Price(input_micro_usd_per_1k=0, output_micro_usd_per_1k=10**10)
    assert vllm.uri.authority == "[2001:db8::1]:8000"
    assert vllm.credential == Credential(file="/run/secrets/vllm", header="x-token", prefix="Token ")
    assert (openai.reports_usage, vllm.reports_usage, spare.reports_usage) == (True, False, True)
    assert policy.default_policy.warmup_window_s == 0
    assert [entry.model for entry in policy.models] == ["gpt-4o", "on"]
    assert policy.models[0].backends[0].allow_list == {"key-1", "7"}
    assert policy.models[0].degraded_backends == {"vllm_6.local"}
    assert [entry.max_output_tokens for entry in policy.models] == [16_384, 1]
    assert [(o.organization_id, o.model) for o in policy.organization_overrides] == [("acme", "gpt-4o"), ("42", "*")]


def test_limits_become_values() -> None:
    limits = loaded(FULL).policy.limits
    assert limits.default == LimitPolicy(
        requests_per_second=100,
        burst=200,
        tokens_per_minute=1_000_000,
        max_parallel=200,
        on_store_error=StoreErrors(rates="local"),
    )
    assert limits.default_key == LimitPolicy(max_parallel=20, on_store_error=StoreErrors(rates="allow", budgets="deny"))
    budgets = (
        Budget(period="MONTHLY", limit_micro_usd=500_500_000, limit_tokens=50_000_000),
        Budget(period="DAILY", limit_tokens=0),
    )
    assert limits.organizations == (("acme", LimitPolicy(budgets=budgets, clamp_output=True)),)
    refusing = StoreErrors(rates="deny", budgets="deny")
    assert limits.keys == (
        ("key-1", LimitPolicy(requests_per_second=5, budgets=(), clamp_output=False, on_store_error=refusing)),
        ("key-2", LimitPolicy(on_store_error=StoreErrors(budgets="allow"))),
    )


def test_what_is_not_written_limits_nothing() -> None:
    policy = loaded(MINIMAL).policy
    assert policy.limits.default == policy.limits.default_key == LimitPolicy()
    assert policy.models[0].max_output_tokens is None


def test_credential_in_another_header_has_no_prefix_unless_given() -> None:
    text = MINIMAL.replace("uri: http://a", "uri: http://a, credential: {env: K, header: api-key}")
    assert loaded(text).policy.backends[0].credential == Credential(env="K", header="api-key", prefix="")


def test_every_problem_is_told_at_its_line_and_path() -> None:
    text = """\
backends:
  - id: a
    uri: http://user:secret@a
    credental: {env: KEY}
  - id: b
    uri: ftp://b
    price: {input_usd_per_1k: 0.0000001, output_usd_per_1k: "1"}
models:
  - model: m
    organization_id: "*"
    backends:
      - {backend_id: aa, weight: 1}
    degraded_backends:
      - b
  - model: z
    backends:
      - {backend_id: a, weight: 0}
kill_switches: [{backend_id: a, enabled: yes}]
"""
    assert problems(text) == [
        "policies/0.yaml:3 backends[0].uri: a URI must not hold a user or password; use 'credential'",
        "policies/0.yaml:4 backends[0].credental: unknown field (did you mean 'credential'?)",
        "policies/0.yaml:6 backends[1].uri: expected a URI such as http://host:8000, got 'ftp://b'",
        "policies/0.yaml:7 backends[1].price.input_usd_per_1k: 0.0000001 has more than 6 decimals",
        "policies/0.yaml:7 backends[1].price.output_usd_per_1k: expected an amount in dollars such as 0.005, "
        "got the string '1'",
        "policies/0.yaml:12 models[0].backends[0].backend_id: unknown backend 'aa' (did you mean 'a'?)",
        "policies/0.yaml:14 models[0].degraded_backends: 'b' is not a backend of this model",
        "policies/0.yaml:17 models[1].backends: weights sum to 0",
        "policies/0.yaml:18 kill_switches[0].enabled: expected true or false, got 'yes'",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("models: 5", "models: expected a list, got a scalar"),
        ("modells: []", "modells: unknown field (did you mean 'models'?)"),
        ("- 1", "expected a mapping, got a list"),
        ("models: [5]", "models[0]: expected a mapping, got a scalar"),
        ("backends: [{uri: http://a}]", "backends[0]: field 'id' is missing"),
        ("backends: [{id: , uri: http://a}]", "backends[0].id: expected a string, got nothing"),
        ("backends: [{id: '', uri: http://a}]", "backends[0].id: must not be empty"),
        ("backends: [{id: a, uri: http://a, <<: {}}]", 'backends[0]["<<"]: merge keys are not read'),
        ("backends: [{id: a, uri: http://a, credential: sk-1}]", "credential: expected a mapping, got a scalar"),
        ("backends: [{id: a, uri: http://a, credential: {}}]", "needs exactly one of 'env' and 'file'"),
        ("backends: [{id: a, uri: http://a, credential: {env: A, file: b}}]", "needs exactly one of 'env' and 'file'"),
        ("backends: [{id: a, uri: http://a, credential: {env: sk-1}}]", "env: is not the name of an environment"),
        ("backends: [{id: a, uri: http://a, credential: {env: A, header: x-router-org}}]", "cannot carry a cred"),
        ("backends: [{id: a, uri: http://a, credential: {env: A, header: 'a b'}}]", "is not the name of a header"),
        ("backends: [{id: a, uri: http://a, credential: {env: A, prefix: 'é'}}]", "holds characters"),
        ("backends: [{id: a, uri: http://a, health_check: {}}]", "health_check: field 'path' is missing"),
        ("backends: [{id: a, uri: http://a, health_check: {path: health}}]", "begins with '/'"),
        ("backends: [{id: a, uri: http://a, timeout: 0s}]", "timeout: must be longer than 0"),
        ("backends: [{id: a, uri: http://a, reports_usage: 'true'}]", "expected true or false, got the string 'true'"),
        ("backends: [{id: a, uri: http://a, price: {input_usd_per_1k: 1}}]", "field 'output_usd_per_1k' is missing"),
        ("default_policy: {failover_threshold: 0}", "must be from 1 to 1000, got 0"),
        ("models: [{model: a b, backends: []}]", "'a b' holds whitespace or a comma"),
        ("models: [{model: 'a,b', backends: []}]", "'a,b' holds whitespace or a comma"),
        ('models: [{model: "a\\0", backends: []}]', "holds a control character"),
        (f"models: [{{model: {'é' * 129}, backends: []}}]", "is longer than 256 bytes"),
        (f"models: [{{model: m, organization_id: {'x' * 5000}, backends: []}}]", "is longer than 4096 characters"),
        ("models: [{model: m, backends: [{backend_id: a, weight: -1}]}]", "must be from 0 to 1000000, got -1"),
        ("models: [{model: m, backends: [{backend_id: a, weight: 1.5}]}]", "expected a whole number, got '1.5'"),
        ("limits: {default: {burst: 0}}", "must be from 1 to"),
        ("limits: {default: {budgets: [{period: YEARLY, usd: 1}]}}", "expected DAILY or MONTHLY, got 'YEARLY'"),
        ("limits: {default: {budgets: [{period: DAILY}]}}", "needs 'usd' or 'tokens'"),
        ("limits: {default: {budgets: [{period: DAILY, usd: 1}, {period: DAILY, usd: 2}]}}", "more than one budget"),
        ("limits: {keys: {'a b': {}}}", "keys[\"a b\"]: 'a b' holds whitespace"),
        ("limits: {on_store_error: deny}", "limits.on_store_error: unknown field"),
        ("limits: {default: {on_store_error: dny}}", "got 'dny' (did you mean 'deny'?)"),
        ("limits: {default: {on_store_error: {rates: dny}}}", "on_store_error.rates: expected local or deny or allow"),
        ("limits: {default: {on_store_error: {budgets: local}}}", "budgets: expected deny or allow, got 'local'"),
        ("limits: {default: {on_store_error: {rate: deny}}}", "on_store_error.rate: unknown field"),
        ("limits: {default: {on_store_error: [deny]}}", "expected a string, got a list"),
        ("limits: {default_keys: {}}", "limits.default_keys: unknown field (did you mean 'default_key'?)"),
        ("limits: {default_key: {max_parallel: 0}}", "limits.default_key.max_parallel: must be from 1 to"),
        ("limits: {default: {budgets: [{period: DAILY, usd: 1000000001}]}}", "must be at most 1000000000"),
        ("models: [{model: m, backends: [], max_output_tokens: 0}]", "must be from 1 to 10000000, got 0"),
        ("models: [{model: m, backends: [], max_output_tokens: 10000001}]", "must be from 1 to 10000000"),
        ("models: [{model: m, backends: [], max_output_tokens: 4k}]", "expected a whole number, got '4k'"),
        (
            "backends: [{id: a, uri: http://a, price: {input_usd_per_1k: 10000.000001, output_usd_per_1k: 1}}]",
            "price.input_usd_per_1k: must be at most 10000",
        ),
    ],
)
def test_what_is_wrong_is_said(text: str, expected: str) -> None:
    assert any(expected in problem for problem in problems(text)), problems(text)


def test_misplaced_secrets_are_not_repeated() -> None:
    text = """\
backends:
  - {id: a, uri: "http://u:hunter2@a", credential: hunter2}
  - {id: b, uri: "u:hunter2@b", credential: {env: hunter-2}}
  - {id: c, uri: "http://u:hunter/2@c"}
"""
    told = "\n".join(problems(text))
    assert len(told.splitlines()) >= 5
    assert "hunter" not in told


@pytest.mark.parametrize(
    ("written", "host", "port", "prefix"),
    [
        ("http://a", "a", 80, ""),
        ("https://a", "a", 443, ""),
        ("HTTP://Mock_Backend.Svc:8001/", "mock_backend.svc", 8001, ""),
        ("http://10.0.0.1:1/v1", "10.0.0.1", 1, "/v1"),
        ("http://[::1]:65535/a%20b/c", "::1", 65535, "/a%20b/c"),
    ],
)
def test_uri_is_taken_apart(written: str, host: str, port: int, prefix: str) -> None:
    found = uri(at(written))
    assert (found.host, found.port, found.path_prefix) == (host, port, prefix)


@pytest.mark.parametrize(
    "written",
    [
        "a",
        "http:a",
        "http://",
        "http:///v1",
        "http://a:0",
        "http://a:65536",
        "http://a:x",
        "http://a:",
        "http://-a",
        "http://a..b",
        "http://1.2.3",
        "http://256.1.1.1",
        "http://[::1",
        "http://[fe80::1%eth0]",
        "http://[1.2.3.4]",
        "http://::1",
        "http://a/?",
        "http://a/#x",
        "http://a@b",
        "http://a b",
        "http://a/b c",
        "http://a//b",
        "http://a/../b",
        "http://a/%zz",
        "unix:///x",
    ],
)
def test_uri_that_cannot_be_reached_is_refused(written: str) -> None:
    with pytest.raises(Wrong):
        uri(at(written))


@pytest.mark.parametrize(
    ("written", "seconds"), [("30s", 30), ("500ms", 0.5), ("2m", 120), ("1h", 3600), ("0.1s", 0.1), ("0s", 0)]
)
def test_duration_is_seconds(written: str, seconds: float) -> None:
    assert duration_or_zero_s(at(written)) == seconds


@pytest.mark.parametrize("written", ["30", "s", "-1s", "1d", "1m30s", "1 s", "25h", "٣s", "1e3s", ""])
def test_duration_without_a_known_unit_is_refused(written: str) -> None:
    with pytest.raises(Wrong):
        duration_or_zero_s(at(written))


@given(st.integers(0, 10**12))
def test_price_is_exact(micro: int) -> None:
    assert micro_usd(at(f"{micro // 10**6}.{micro % 10**6:06}")) == micro


@pytest.mark.parametrize("written", ["0.0000001", "-1", "1e3", ".inf", "nan", "1_000", "1000000001", "0x10", ""])
def test_price_that_is_not_an_exact_amount_is_refused(written: str) -> None:
    with pytest.raises(Wrong):
        micro_usd(at(written))


@pytest.mark.parametrize("written", ["010", "0x1f", "1_000", "1.0", "1e3", "٣", "9" * 5000, ""])
def test_whole_number_has_one_spelling(written: str) -> None:
    with pytest.raises(Wrong):
        integer(0, 10**15)(at(written))


@pytest.mark.parametrize("written", ["on", "no", "1.0", "0x1f", "2024-01-01", "true", "12"])
def test_name_is_what_was_written(written: str) -> None:
    assert name(at(written)) == written


def test_name_is_encodable() -> None:
    with pytest.raises(Wrong, match="control character"):
        name(at("a\ud800"))


def test_quoted_null_is_a_name_and_a_bare_one_is_nothing() -> None:
    assert name(at("null", quoted=True)) == "null"
    with pytest.raises(Wrong, match="got nothing"):
        name(at("null"))


def test_line_is_found_by_path() -> None:
    scalar = Scalar(text="x", place=Place(file="f", line=3))
    key = Scalar(text='odd "key"', place=Place(file="f", line=2))
    row = Sequence(items=(scalar,), place=Place(file="f", line=2))
    root = Mapping(entries=((key, row),), place=Place(file="f", line=1))
    assert line_of(root, '["odd \\"key\\""][0]') == 3
    assert line_of(root, '["odd \\"key\\""][7].x') == 2
    assert line_of(root, "absent") is None


def test_endpoints_are_backends_with_defaults() -> None:
    backends, found = parse_endpoints(" a:http://h:1/x , b:https://[::1]", file="BACKEND_ENDPOINTS")
    assert found == ()
    assert [(b.id, b.uri.authority, b.timeout_s) for b in backends] == [("a", "h:1", 30.0), ("b", "[::1]", 30.0)]


_WORDS = st.sampled_from(
    (
        "backends",
        "models",
        "limits",
        "default_policy",
        "kill_switches",
        "organization_overrides",
        "id",
        "uri",
        "model",
        "backend_id",
        "weight",
        "price",
        "credential",
        "env",
        "file",
        "health_check",
        "path",
        "labels",
        "allow_list",
        "deny_list",
        "degraded_backends",
        "enabled",
        "default",
        "default_key",
        "max_output_tokens",
        "on_store_error",
        "rates",
        "keys",
        "organizations",
        "budgets",
        "period",
        "usd",
        "tokens",
        "timeout",
        "ejection",
        "input_usd_per_1k",
        "output_usd_per_1k",
    )
)
_places = st.builds(Place, file=st.just("f.yaml"), line=st.integers(1, 99))
_scalars = st.builds(
    Scalar,
    text=st.one_of(_WORDS, st.text(max_size=8), st.from_regex(r"[0-9]{1,3}(s|\.[0-9])?", fullmatch=True)),
    quoted=st.booleans(),
    place=_places,
)
_trees: st.SearchStrategy[Node] = st.recursive(
    _scalars,
    lambda nodes: st.one_of(
        st.builds(Sequence, items=st.lists(nodes, max_size=3).map(tuple), place=_places),
        st.builds(
            Mapping,
            entries=st.lists(
                st.tuples(st.one_of(st.builds(Scalar, text=_WORDS, place=_places), nodes), nodes), max_size=5
            ).map(tuple),
            place=_places,
        ),
    ),
    max_leaves=25,
)


@settings(max_examples=300)
@given(st.lists(_trees, max_size=3))
def test_parse_never_raises_and_every_problem_has_a_place(roots: list[Node]) -> None:
    for problem in parse(roots).problems:
        assert isinstance(problem, Problem)
        assert problem.place.file == "f.yaml"
        assert problem.place.line >= 1
        assert problem.text


@given(st.text(max_size=60))
def test_endpoints_never_raise(written: str) -> None:
    backends, found = parse_endpoints(written, file="BACKEND_ENDPOINTS")
    assert backends or found or not written.strip()
