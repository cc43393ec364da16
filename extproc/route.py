"""The last step: which model and which subset of its backends, as headers for Envoy's route table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from extproc.authenticate import has_scope
from extproc.edit import Edit, edited, in_order, place_after, setting
from extproc.exchange import Forward, Metadata, Pass
from extproc.json_body import Document, written
from extproc.keys.record import Caller
from extproc.validate import Ask
from gateway import names
from gateway.endpoints import Endpoint, Kind
from gateway.errors import Reason, Refused
from policies.candidates import PolicyIndex
from policies.model import BackendId

_WATCHED: Final = (Kind.CHAT, Kind.COMPLETION)
"""Streams of these end with [DONE]; the Lua filter watches over that and takes out the usage that is asked for here."""
_STREAMED: Final = (*_WATCHED, Kind.RESPONSE)
"""Events of streams of these are counted on their way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Where a request may go: None stands for every backend of the model."""

    variant: frozenset[BackendId] | None
    reports_usage: bool


def choose(caller: Caller, ask: Ask, index: PolicyIndex, silent: frozenset[BackendId]) -> Choice:
    """Which backends of the asked model this key may use; ``silent`` ones report no usage.

    Raises:
        Refused: MODEL_UNKNOWN, MODEL_FORBIDDEN, BACKENDS_FORBIDDEN or BACKENDS_KILLED.
    """
    resolved = index.lookup(caller.organization_id, ask.model)
    if resolved is None:
        shown = json.dumps(ask.model[:256])
        raise Refused(Reason.MODEL_UNKNOWN, f"The model {shown} does not exist.", param="model")
    if not caller.may_use(ask.model):
        raise Refused(Reason.MODEL_FORBIDDEN, param="model")
    variant = resolved.variant(caller.key_id)
    if variant is not None and not variant:
        raise Refused(Reason.BACKENDS_FORBIDDEN, param="model")
    if resolved.all_killed(caller.key_id):
        raise Refused(Reason.BACKENDS_KILLED)
    reports = not silent or silent.isdisjoint(weighted.backend_id for weighted in resolved.entry.backends)
    return Choice(variant=variant, reports_usage=reports)


def tells_usage(ask: Ask, choice: Choice) -> bool:
    """Whether a backend that can report usage does so in its answer: in most streams only where it is asked to."""
    options = ask.document.members.get("stream_options")
    asked = bool(options and options.get("include_usage"))
    return choice.reports_usage or asked or not ask.stream or ask.kind not in _WATCHED


def _ask_for_usage(document: Document) -> Edit | None:
    """What adds ``stream_options.include_usage`` to the body; None when the client asked for it itself."""
    options = document.members.get("stream_options")
    if options and options.get("include_usage"):
        return None
    there = "stream_options" in document.members
    wanted = written({**(options or {}), "include_usage": True}) if there else '{"include_usage":true}'
    return setting(document, "stream_options", wanted)


def _model_span(document: Document, edits: Sequence[Edit], text: str) -> str:
    """Value of the model span header: where the model's name stands in the edited text, in bytes."""
    start, end = place_after(edits, document.place("model"))
    if text.isascii():
        return f"{start}:{end - start}"
    return f"{len(text[:start].encode())}:{len(text[start:end].encode())}"


def route(
    caller: Caller,
    ask: Ask,
    choice: Choice,
    endpoint: Endpoint,
    edits: Sequence[Edit] = (),
    *,
    metadata: Sequence[tuple[str, str | bool]] = (),
    figures: tuple[tuple[str, str], ...] = (),
) -> Forward:
    """The command that sends a request on its way; the body changes only where it must.

    ``edits`` are of the ask's document, in any order; none of them touches ``model`` or ``stream_options``.
    ``metadata`` and ``figures`` go along: the second are metadata that no two requests share.
    """
    watched = ask.stream and endpoint.kind in _WATCHED
    usage = _ask_for_usage(ask.document) if watched and choice.reports_usage else None
    edits = in_order(edits if usage is None else (*edits, usage))
    text = edited(ask.document.text, edits)
    headers = [
        (names.HEADER_ORGANIZATION, caller.organization_id),
        (names.HEADER_MODEL, ask.model),
        (names.HEADER_MODEL_SPAN, _model_span(ask.document, edits, text)),
    ]
    if choice.variant is not None:
        headers.append((names.HEADER_VARIANT, names.variant(choice.variant)))
    if ask.path is not None:
        headers += [(":path", ask.path), (names.HEADER_ENDPOINT, endpoint.kind.value)]
    said: list[tuple[str, str | bool]] = [*metadata, (names.METADATA_MODEL, ask.model)]
    if ask.stream and endpoint.kind in _STREAMED:
        said.append((names.METADATA_STREAM, True))
    if watched:
        said.append((names.METADATA_STRIP_USAGE, usage is not None))
    return Forward(
        headers=tuple(headers),
        body=text.encode() if edits or ask.path is not None else None,
        metadata=tuple(said),
        limits=figures,
    )


def to_ledger(caller: Caller, metadata: Metadata) -> Pass:
    """The command that lets a caller ask the ledger for its own organisation; with the admin scope, for every one."""
    headers: tuple[tuple[str, str], ...] = ((names.HEADER_ORGANIZATION, caller.organization_id),)
    if has_scope(caller, "admin"):
        headers += ((names.HEADER_ADMIN, "true"),)
    return Pass(headers=headers, metadata=metadata)
