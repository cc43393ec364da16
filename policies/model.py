"""Routing policy as immutable values. Pure: no I/O, no YAML.

Times are seconds, weights are the operator's integers, prices are micro-dollars per 1,000 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NewType

BackendId = NewType("BackendId", str)
ModelName = NewType("ModelName", str)
OrganizationId = NewType("OrganizationId", str)
KeyId = NewType("KeyId", str)

ANY = "*"
"""Organisation or model that stands for every one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where in the policy directory a thing was written, for messages."""

    file: str
    line: int
    path: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.path}".rstrip()


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing wrong with a policy directory."""

    place: Place
    text: str

    def __str__(self) -> str:
        return f"{self.place}: {self.text}"


class PolicyRejected(Exception):
    """A policy that cannot be put in force; ``problems`` is never empty and in the order of the files."""

    def __init__(self, problems: tuple[Problem, ...]) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = problems


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendUri:
    """Where a backend listens. ``path_prefix`` is '' or starts with '/' and does not end with one."""

    scheme: Literal["http", "https"]
    host: str
    port: int
    path_prefix: str

    @property
    def authority(self) -> str:
        """Value of the Host header: the port is left out where it is the scheme's own."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        default = 443 if self.scheme == "https" else 80
        return host if self.port == default else f"{host}:{self.port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthCheck:
    """Active health check by GET; ``path`` is absolute on the backend's host."""

    path: str
    interval_s: float = 10.0
    timeout_s: float = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Credential:
    """Where a provider credential is read from: exactly one of ``env`` and ``file`` is set."""

    env: str | None = None
    file: str | None = None
    header: str = "authorization"
    prefix: str = "Bearer "


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """Micro-dollars per 1,000 tokens. Cached input and reasoning cost the same as other input and output where None."""

    input_micro_usd_per_1k: int
    output_micro_usd_per_1k: int
    cached_input_micro_usd_per_1k: int | None = None
    reasoning_micro_usd_per_1k: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """One place that serves models. ``timeout_s``: no first byte within it, and the next backend is tried."""

    id: BackendId
    uri: BackendUri
    model_variant: str | None = None
    timeout_s: float = 30.0
    health_check: HealthCheck | None = None
    credential: Credential | None = None
    price: Price | None = None
    labels: tuple[tuple[str, str], ...] = ()
    reports_usage: bool = True
    place: Place


@dataclass(frozen=True, slots=True, kw_only=True)
class DefaultPolicy:
    """Outlier detection for every backend: consecutive 5xx until ejection, and for how long."""

    failover_threshold: int = 3
    ejection_s: float = 30.0
    warmup_window_s: float = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightedBackend:
    """A backend's share of a model's traffic. Weight 0: used only when the others failed.

    An empty ``allow_list`` allows every key; a deny entry wins over an allow entry.
    """

    backend_id: BackendId
    weight: int
    allow_list: frozenset[KeyId] = frozenset()
    deny_list: frozenset[KeyId] = frozenset()
    place: Place

    def admits(self, key_id: KeyId | None) -> bool:
        """Whether a key may use this backend; None stands for a key that no list names."""
        if key_id in self.deny_list:
            return False
        return not self.allow_list or key_id in self.allow_list


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPolicy:
    """How one model is spread over backends for one organisation, or for all ('*').

    ``max_output_tokens`` is the most that the model ever answers with; None: the router's own assumption.
    """

    model: ModelName
    organization_id: OrganizationId
    backends: tuple[WeightedBackend, ...]
    degraded_backends: frozenset[BackendId] = frozenset()
    max_output_tokens: int | None = None
    place: Place


@dataclass(frozen=True, slots=True, kw_only=True)
class OrganizationOverride:
    """An operator's temporary choice that replaces the backends of one organisation; model '*' is every model."""

    organization_id: OrganizationId
    model: ModelName
    backends: tuple[WeightedBackend, ...]
    reason: str = ""
    place: Place


@dataclass(frozen=True, slots=True, kw_only=True)
class KillSwitch:
    """While enabled, the backend gets no request at all."""

    backend_id: BackendId
    enabled: bool
    reason: str = ""
    place: Place


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What may be spent in one period; at least one of the two limits is set."""

    period: Literal["DAILY", "MONTHLY"]
    limit_micro_usd: int | None = None
    limit_tokens: int | None = None


OnStoreError = Literal["local", "deny", "allow"]
"""``local``: each worker counts for itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreErrors:
    """What holds while the limit store is down, for each class of limits; None: the next wider one applies.

    ``rates`` are requests, tokens a minute and parallel requests. Budgets cannot be counted by each worker for itself.
    """

    rates: OnStoreError | None = None
    budgets: Literal["deny", "allow"] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitPolicy:
    """Limits of one key, one organisation or all; None: the next wider one applies.

    ``clamp_output`` cuts the asked-for output to what is left.
    """

    requests_per_second: int | None = None
    burst: int | None = None
    tokens_per_minute: int | None = None
    max_parallel: int | None = None
    budgets: tuple[Budget, ...] | None = None
    clamp_output: bool | None = None
    on_store_error: StoreErrors | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The ``limits`` section: pairs are sorted by id and no id occurs twice.

    ``default`` is for each organisation, ``default_key`` for each key.
    """

    default: LimitPolicy = LimitPolicy()
    default_key: LimitPolicy = LimitPolicy()
    organizations: tuple[tuple[OrganizationId, LimitPolicy], ...] = ()
    keys: tuple[tuple[KeyId, LimitPolicy], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """Everything a policy directory says. ``digest`` names its content (hex SHA-256 of the files)."""

    backends: tuple[Backend, ...]
    default_policy: DefaultPolicy
    models: tuple[ModelPolicy, ...]
    organization_overrides: tuple[OrganizationOverride, ...] = ()
    kill_switches: tuple[KillSwitch, ...] = ()
    limits: Limits = Limits()
    digest: str = ""
