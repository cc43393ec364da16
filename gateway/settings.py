"""Settings of the programs: environment over the YAML file named by ROUTER_CONFIG, over defaults.

Each program reads its own frozen class once, in ``__main__``. A variable is the field's name in upper
case. Sockets are relative to RUN_DIR, which is also Envoy's working directory.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, YamlConfigSettingsSource

VERSION = "0.1.0"

Port = Annotated[int, Field(ge=1, le=65535)]

XDS_SOCKET = "xds.sock"
VALKEY_SOCKET = "valkey.sock"
STATUS_SOCKET = "extproc-status.sock"
USAGE_SOCKET = "usage.sock"
AUDIT_SOCKET = "audit.sock"
JOURNAL = "requests.jsonl"
"""Where Envoy writes down each request that has ended, for a ledger that was not there to be told."""
LAST_GOOD_FILE = "last-good-policies.json"


class SettingsError(Exception):
    """Settings that cannot be used; the text names each variable at fault, one a line."""


class CommonSettings(BaseSettings):
    """What every program reads."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore", env_ignore_empty=True)

    service_name: str = "api-router-service"
    environment: Literal["development", "staging", "production"] = "development"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["json", "console"] = "json"
    run_dir: Path = Path(".run")
    """Unix sockets, the same path for every program and for Envoy; short, because a socket path holds 107 bytes."""
    state_dir: Path | None = None
    """What survives a restart: the last good policy. Default: RUN_DIR."""
    policy_dir: Path = Path("policies")
    backend_endpoints: str = ""
    """``id1:uri1,id2:uri2``: adds to or overrides the backends of the policy files."""
    extproc_workers: Annotated[int, Field(ge=1, le=64)] = os.cpu_count() or 1
    inference_payload_max_bytes: Annotated[int, Field(ge=1)] = 65_536
    body_max_bytes: Annotated[int, Field(ge=1024)] = 8 * 1024 * 1024
    answer_max_bytes: Annotated[int, Field(ge=1024)] = 16 * 1024 * 1024
    """A JSON answer is held until its usage has been read; a larger one fails. Streams have no limit."""
    sign_of_life_s: Annotated[float, Field(ge=0.1, le=300)] = 60.0
    """How often Envoy tells the ledger of a request that still runs."""
    otel_exporter_otlp_endpoint: str = ""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Environment first, then the file that ROUTER_CONFIG names."""
        sources: list[PydanticBaseSettingsSource] = [init_settings, env_settings]
        config = os.environ.get("ROUTER_CONFIG")
        if config:
            if not Path(config).is_file():
                raise SettingsError(f"ROUTER_CONFIG: {config} is not a file")
            sources.append(YamlConfigSettingsSource(settings_cls, yaml_file=config))
        return tuple(sources)

    @property
    def buffer_bytes(self) -> int:
        """What one exchange may hold in Envoy and in a worker: the largest body, and room for what is added to it.

        Envoy has one limit for both directions of an HTTP/2 stream.
        """
        return max(self.body_max_bytes, self.answer_max_bytes) + 64 * 1024

    @property
    def state_path(self) -> Path:
        """Directory for what survives a restart."""
        return self.state_dir or self.run_dir

    def worker_socket(self, worker: int) -> str:
        """File name in RUN_DIR of one ext_proc worker's socket."""
        return f"extproc-{worker}.sock"


class StoreSettings(CommonSettings):
    """What the programs that use the limit store read."""

    redis_addr: str = ""
    """``host:port``, ``redis://…``, ``rediss://…`` or ``unix:///path``; empty: no keys in Redis, and no limits."""
    limit_store_deadline_s: Annotated[float, Field(gt=0, le=10)] = 0.25
    """For one call to the limit store; a server that takes longer counts as down."""
    limit_overdue_s: Annotated[float, Field(ge=1)] = 900.0
    """A request that has not ended after so long is charged what was reserved; its access log entry corrects that."""
    audit_events_max: Annotated[int, Field(ge=1)] = 100_000
    """Audit events kept in the store; the oldest go first."""


class ExtprocSettings(StoreSettings):
    """``python -m extproc``."""

    idempotency_window_s: Annotated[float, Field(gt=0)] = 300.0
    """How long an answer is repeated to those who send its idempotency key again."""
    idempotency_answer_max_bytes: Annotated[int, Field(ge=0)] = 1024 * 1024
    """A larger answer is not kept: a repetition of its request is answered 409."""
    budget_service_endpoint: str = ""
    """Base URL of the budget service; empty: the policy's budgets alone."""
    budget_service_timeout_s: Annotated[float, Field(gt=0, le=5)] = 0.5
    budget_service_ttl_s: Annotated[float, Field(ge=0)] = 5.0
    key_file: Path | None = None
    """YAML file of hashed keys, as ``router keys create --file`` writes it."""
    user_org_service_url: str = ""
    user_org_timeout_s: Annotated[float, Field(gt=0, le=30)] = 2.0
    key_cache_ttl_s: Annotated[float, Field(ge=0)] = 60.0
    key_cache_negative_ttl_s: Annotated[float, Field(ge=0)] = 5.0
    key_cache_size: Annotated[int, Field(ge=1)] = 100_000
    envoy_admin_address: str = "127.0.0.1:9901"
    admin_port: Port = 8081
    xds_admin_address: str = ""
    """``host:port`` of xds' admin API; default: loopback on ADMIN_PORT."""
    extproc_metrics_port: Port = 9102
    drain_timeout_s: Annotated[float, Field(ge=0)] = 10.0


class XdsSettings(CommonSettings):
    """``python -m xds``."""

    http_host: str = "0.0.0.0"
    http_port: Port = 8080
    admin_host: str = "127.0.0.1"
    admin_port: Port = 8081
    xds_grpc_address: str = ""
    """gRPC address of ADS besides the unix socket, such as ``0.0.0.0:18000``; empty: the socket only."""
    upstream_ca_file: str = ""
    """PEM bundle on Envoy's machine that https backends are checked against; empty: the system's."""


class UsageSettings(StoreSettings):
    """``python -m usage``."""

    usage_metrics_port: Port = 9103
    usage_sweep_interval_s: Annotated[float, Field(gt=0)] = 10.0
    """Between two looks for overdue requests."""
    usage_retention_days: Annotated[float, Field(gt=0)] = 30.0
    """How long requests, audit events and JSONL files are kept after they were handed on."""
    usage_backlog_max: Annotated[int, Field(ge=1000)] = 14_400_000
    """Requests that the disk has room for while they cannot be handed on: 24 hours at 10,000 a minute, some 30 GB.
    More make readiness warn; none is refused or lost for it as long as there is room.
    """
    usage_late_warning_s: Annotated[float, Field(gt=0)] = 300.0
    """When the oldest request that was not handed on makes readiness warn."""
    kafka_brokers: str = ""
    """``host:port,host:port``; empty: records and audit events go to JSONL files in STATE_DIR."""
    kafka_config_file: Path | None = None
    """``name=value`` lines for librdkafka, such as security.protocol and sasl.*."""
    envoy_admin_address: str = "127.0.0.1:9901"


S = TypeVar("S", bound=CommonSettings)


def read(settings: type[S]) -> S:
    """Settings of a program from the environment and the ROUTER_CONFIG file.

    Raises:
        SettingsError: a value has the wrong form; names every variable at fault.
    """
    try:
        return settings()
    except ValidationError as error:
        lines = (f"{'_'.join(map(str, e['loc'])).upper()}: {e['msg']} (got {e['input']!r})" for e in error.errors())
        raise SettingsError("\n".join(lines)) from error
