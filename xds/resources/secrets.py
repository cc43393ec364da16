"""Provider credentials as SDS secrets: they go to Envoy and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from envoy_data_plane.envoy.config.core.v3 import DataSource
from envoy_data_plane.envoy.extensions.transport_sockets.tls.v3 import GenericSecret, Secret

from gateway import names
from policies.model import Backend, Policy, Problem


def read_credentials(policy: Policy, environ: Mapping[str, str]) -> tuple[dict[str, str], tuple[Problem, ...]]:
    """Credentials by backend id, and a problem for each that cannot be read. A value is never in a text."""
    values: dict[str, str] = {}
    problems: list[Problem] = []
    for backend in policy.backends:
        if backend.credential is None:
            continue
        text, fault = _read(backend, environ)
        if fault:
            problems.append(Problem(place=backend.place, text=f"credential of {backend.id}: {fault}"))
        else:
            values[backend.id] = backend.credential.prefix + text
    return values, tuple(problems)


def _read(backend: Backend, environ: Mapping[str, str]) -> tuple[str, str]:
    assert backend.credential is not None  # noqa: S101 - the caller has looked
    env, file = backend.credential.env, backend.credential.file
    if env is not None:
        text = environ.get(env, "").strip()
        return text, "" if text else f"environment variable {env} is not set"
    try:
        text = Path(str(file)).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        return "", f"file {file} cannot be read: {type(error).__name__}"
    return text, "" if text else f"file {file} is empty"


def secret(backend_id: str, credential: str) -> Secret:
    """SDS secret of one backend."""
    return Secret(
        name=names.credential_secret(backend_id),
        generic_secret=GenericSecret(secret=DataSource(inline_string=credential)),
    )
