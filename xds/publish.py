"""From the policy directory to the snapshot that every Envoy is served: load, build, check, publish, remember."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from gateway.settings import LAST_GOOD_FILE, SettingsError, XdsSettings
from gateway.telemetry import Logger
from policies.load import Loaded, PolicyRejected, load, load_or_last_good, save_last_good
from policies.model import Place, Policy, Problem
from policies.watch import watch
from xds.admin import PolicyStatus
from xds.resources.build import ResourceBuilder
from xds.resources.secrets import read_credentials
from xds.server import AdsServer
from xds.snapshot import Snapshot

Source = Literal["policy_dir", "last_good"]


class Publisher:
    """Keeps the served snapshot in step with the policy directory. A rejected edit changes nothing."""

    def __init__(self, settings: XdsSettings, server: AdsServer, *, log: Logger) -> None:
        self._settings = settings
        self._server = server
        self._log = log
        self._builder = ResourceBuilder(settings)
        self._last_good = settings.state_path / LAST_GOOD_FILE
        self._loaded: Loaded | None = None
        self.status: PolicyStatus | None = None

    @property
    def policy(self) -> Policy | None:
        """The policy in force."""
        return self._loaded.policy if self._loaded else None

    def start(self) -> None:
        """Publish the directory's policy, or the last good one where it is rejected. Blocks on files.

        Raises:
            PolicyRejected: neither can be used.
            SettingsError: a setting that the resources need cannot be used.
        """
        start = load_or_last_good(self._settings.policy_dir, self._settings.backend_endpoints, self._last_good)
        source: Source = "last_good" if start.problems else "policy_dir"
        if start.problems:
            self._log_rejected(start.problems, in_force="last_good")
        self._put_in_force(start.loaded, self._snapshot(start.loaded), source=source, problems=start.problems)

    async def follow(self) -> None:
        """Publish every change of the directory and of credential files, until cancelled."""
        in_force = self._loaded.bundle if self._loaded else None
        async for change in watch(self._settings.policy_dir, extra_files=self._credential_files, loaded=in_force):
            try:
                loaded = await asyncio.to_thread(load, change.usable(), self._settings.backend_endpoints)
                snapshot = await asyncio.to_thread(self._snapshot, loaded)
            except PolicyRejected as rejected:
                self._rejected(rejected.problems)
            except SettingsError as error:
                place = Place(file=str(self._settings.policy_dir), line=1)
                self._rejected((Problem(place=place, text=str(error)),))
            else:
                self._put_in_force(loaded, snapshot, source="policy_dir")

    def _snapshot(self, loaded: Loaded) -> Snapshot:
        credentials, problems = read_credentials(loaded.policy, os.environ)
        if problems:
            raise PolicyRejected(problems)
        resources = self._builder.build(loaded.policy, credentials)
        return Snapshot.build(resources.bodies, references=resources.references, previous=self._server.snapshot)

    def _put_in_force(
        self, loaded: Loaded, snapshot: Snapshot, *, source: Source, problems: tuple[Problem, ...] = ()
    ) -> None:
        self._server.set_snapshot(snapshot)
        self._loaded = loaded
        self.status = PolicyStatus(
            digest=loaded.policy.digest,
            loaded_at=datetime.now(UTC).isoformat(timespec="seconds"),
            source=source,
            problems=tuple(str(problem) for problem in problems),
            warnings=tuple(str(warning) for warning in loaded.warnings),
        )
        if source == "policy_dir":
            self._remember(loaded)
        self._log.info(
            "policy_in_force",
            digest=loaded.policy.digest,
            snapshot=snapshot.version,
            source=source,
            backends=len(loaded.policy.backends),
            models=len(loaded.policy.models),
            warnings=[str(warning) for warning in loaded.warnings],
        )

    def _remember(self, loaded: Loaded) -> None:
        try:
            save_last_good(loaded.bundle, self._last_good)
        except OSError as error:
            # Serving goes on; only a restart with a broken directory would miss it.
            self._log.error("last_good_policy_not_saved", path=str(self._last_good), error=str(error))

    def _rejected(self, problems: tuple[Problem, ...]) -> None:
        self._log_rejected(problems, in_force=self.policy.digest if self.policy else "")
        if self.status is not None:
            self.status = replace(self.status, problems=tuple(str(problem) for problem in problems))

    def _log_rejected(self, problems: tuple[Problem, ...], *, in_force: str) -> None:
        self._log.warning("policy_rejected", problems=[str(problem) for problem in problems], in_force=in_force)

    def _credential_files(self) -> Iterable[Path]:
        policy = self.policy
        for backend in policy.backends if policy else ():
            if backend.credential is not None and backend.credential.file is not None:
                yield Path(backend.credential.file)
