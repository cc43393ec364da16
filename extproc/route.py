"""The last step: which model and which subset of its backends, as headers for Envoy's route table."""

from __future__ import annotations

import json
from dataclasses import dataclass

from extproc.exchange import Forward
from extproc.json_body import Document, written
from extproc.keys.record import Caller
from extproc.validate import Ask
from gateway import names
from gateway.endpoints import Endpoint, Kind
from gateway.errors import Reason, Refused
from policies.candidates import PolicyIndex
from policies.model import BackendId


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


@dataclass(frozen=True, slots=True)
class Edit:
    """A replacement of ``text[start:end]``, in characters."""

    start: int
    end: int
    replacement: str

    def apply(self, text: str) -> str:
        """The text with the replacement in place."""
        return text[: self.start] + self.replacement + text[self.end :]

    @property
    def moved(self) -> int:
        """How far everything after the edit moves."""
        return len(self.replacement) - (self.end - self.start)


def _ask_for_usage(document: Document) -> Edit | None:
    """What adds ``stream_options.include_usage`` to the body; None when the client asked for it itself."""
    options = document.members.get("stream_options")
    if options and options.get("include_usage"):
        return None
    if "stream_options" not in document.members:
        opening = document.text.index("{") + 1
        return Edit(opening, opening, '"stream_options":{"include_usage":true},')
    wanted = written({**(options or {}), "include_usage": True})
    return Edit(*document.place("stream_options"), wanted)


def _model_span(document: Document, edit: Edit | None, text: str) -> str:
    """Value of the model span header: where the model's name stands in the edited text, in bytes."""
    start, end = document.place("model")
    if edit is not None and start >= edit.end:
        start, end = start + edit.moved, end + edit.moved
    if text.isascii():
        return f"{start}:{end - start}"
    return f"{len(text[:start].encode())}:{len(text[start:end].encode())}"


def route(caller: Caller, ask: Ask, choice: Choice, endpoint: Endpoint) -> Forward:
    """The command that sends a request on its way; the body changes only where it must."""
    # Streams of these two end with [DONE]; the Lua filter watches over that and takes out what is added here.
    watched = ask.stream and endpoint.kind in (Kind.CHAT, Kind.COMPLETION)
    edit = _ask_for_usage(ask.document) if watched and choice.reports_usage else None
    text = edit.apply(ask.document.text) if edit else ask.document.text
    headers = [
        (names.HEADER_ORGANIZATION, caller.organization_id),
        (names.HEADER_MODEL, ask.model),
        (names.HEADER_MODEL_SPAN, _model_span(ask.document, edit, text)),
    ]
    if choice.variant is not None:
        headers.append((names.HEADER_VARIANT, names.variant(choice.variant)))
    if ask.path is not None:
        headers += [(":path", ask.path), (names.HEADER_ENDPOINT, endpoint.kind.value)]
    metadata: list[tuple[str, str | bool]] = [
        (names.METADATA_ORGANIZATION, caller.organization_id),
        (names.METADATA_KEY, caller.key_id),
        (names.METADATA_MODEL, ask.model),
    ]
    if watched:
        metadata += [(names.METADATA_STREAM, True), (names.METADATA_STRIP_USAGE, edit is not None)]
    return Forward(
        headers=tuple(headers),
        body=text.encode() if edit or ask.path is not None else None,
        metadata=tuple(metadata),
    )
