"""Keeps every policy that was in force, so that a receipt can be explained after it has changed."""

from __future__ import annotations

import asyncio
import json
import time

from gateway.audit import AuditAction, AuditEvent
from gateway.settings import LAST_GOOD_FILE, CommonSettings
from gateway.telemetry import Logger
from policies.load import Bundle, Loaded, PolicyRejected, load, load_or_last_good
from policies.watch import watch
from usage.spool import POLICY_MARK, Changes
from usage.writer import Writer


async def keep_policies(settings: CommonSettings, writer: Writer, *, log: Logger) -> None:
    """Keep the policy in force and each that follows it, until cancelled; a change of it is audited."""
    bundle: Bundle | None = None
    try:
        last_good = settings.state_path / LAST_GOOD_FILE
        start = await asyncio.to_thread(load_or_last_good, settings.policy_dir, settings.backend_endpoints, last_good)
        bundle = start.loaded.bundle
        await _keep(start.loaded, settings.backend_endpoints, writer)
    except PolicyRejected as rejected:
        log.warning("policy_rejected", problems=[str(problem) for problem in rejected.problems])
    async for change in watch(settings.policy_dir, loaded=bundle):
        try:
            loaded = await asyncio.to_thread(load, change.usable(), settings.backend_endpoints)
        except PolicyRejected as rejected:
            log.warning("policy_rejected", problems=[str(problem) for problem in rejected.problems])
            continue
        await _keep(loaded, settings.backend_endpoints, writer)


async def _keep(loaded: Loaded, backend_endpoints: str, writer: Writer) -> None:
    digest, now_s = loaded.policy.digest, time.time()
    kept = {"directory": loaded.bundle.directory, "files": loaded.bundle.files, "backend_endpoints": backend_endpoints}
    document = json.dumps(kept)
    before = await writer.mark(POLICY_MARK, "")
    if before == digest:
        await writer.write(Changes(policies=[(digest, document)]))
        return
    event = AuditEvent(
        event_id=f"policy:{digest}:{int(now_s)}",
        request_id="",
        organization_id="",
        actor="",
        action=AuditAction.POLICY_UPDATE,
        metadata={"policy_version": digest, "policy_before": before},
        created_at=now_s,
    )
    await writer.write(Changes(events=[event], marks={POLICY_MARK: digest}, policies=[(digest, document)]))


def read_policy(document: str) -> Loaded:
    """The policy that was kept as this document.

    Raises:
        PolicyRejected: this version of the program does not accept it.
    """
    kept = json.loads(document)
    bundle = Bundle.of(kept["directory"], ((name, text) for name, text in kept["files"]))
    # Without them a model whose backends the environment has added would have backends that are none.
    return load(bundle, kept.get("backend_endpoints", ""))
